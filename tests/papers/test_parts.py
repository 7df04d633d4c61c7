"""The experiments' parts against definitions written out here, and the claims on made-up tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import nn

from hf_so2.natural_gradient import Fisher
from hf_so2.papers import approximations, directions, foof, mup_claims, report, tekfac, training, widths
from hf_so2.papers.digits import Digits, mlp
from hf_so2.papers.mup_transfer import exponents
from hf_so2.papers.training import TRIALS, Run, tune
from hf_so2.papers.verdict import Claim, Outcome, compare


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load(torch.float64)


def rows(examples: int = 40) -> approximations.Rows:
    generator = torch.Generator().manual_seed(0)
    h, delta = (torch.randn(examples, size, generator=generator, dtype=torch.float64) for size in (5, 3))
    return approximations.Rows(h + 0.5, delta * h[:, :1])  # neither centred nor independent


def test_the_dense_block_and_what_approximates_it() -> None:
    sample = rows()
    h, delta = sample.h.numpy(), sample.delta.numpy()
    vectors = np.stack([np.outer(d, x).ravel() for d, x in zip(delta, h, strict=True)])
    fisher = vectors.T @ vectors / len(h)
    np.testing.assert_allclose(sample.fisher.numpy(), fisher, atol=1e-12)

    sizes_h, sizes_d = (h**2).sum(axis=1), (delta**2).sum(axis=1)
    tau = (sizes_h * sizes_d).mean()
    weighted = [np.einsum("n,ni,nj->ij", w, x, x) / len(h) for w, x in ((sizes_h, delta), (sizes_d, h))]
    expected = {"K-FAC": np.kron(delta.T @ delta, h.T @ h) / len(h) ** 2, "TKFAC": np.kron(*weighted) / tau}
    for corrected, of in (("EKFAC", "K-FAC"), ("TEKFAC", "TKFAC")):
        basis = np.linalg.eigh(expected[of])[1]  # distinct eigenvalues: the basis is unique
        expected[corrected] = basis @ np.diag(np.diag(basis.T @ fisher @ basis)) @ basis.T
    for name, block in approximations.METHODS.items():
        matrix = approximations.dense(name, approximations.fitted(block, sample))
        np.testing.assert_allclose(matrix.numpy(), expected[name], atol=1e-8 * np.abs(fisher).max())
        ratio = approximations.trace_ratio(matrix, sample.fisher)
        assert ratio == pytest.approx(np.trace(expected[name]) / np.trace(fisher))
        error = np.linalg.norm(expected[name] - fisher) / np.linalg.norm(fisher)
        assert approximations.error(matrix, sample.fisher) == pytest.approx(error)


def test_rows_multiply_to_the_gradient(digits: Digits) -> None:
    """δ and h are those of the drawn labels: their mean product is the gradient for the same draw."""
    model = mlp(6, 3, 0, torch.float64)
    images = digits.images[:50]
    found = approximations.rows_of(model, images, torch.Generator().manual_seed(3))
    drawn = torch.multinomial(model(images).softmax(dim=1), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    nn.functional.cross_entropy(model(images), drawn).backward()
    for layer, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(layer.delta.mT @ layer.h / 50, parameter.grad)


@pytest.mark.parametrize("name", ["K-FAC", "K-FAC, standard damping", "FOOF", "block-diagonal", "natural gradient"])
def test_directions_are_what_they_are_called(name: str, digits: Digits) -> None:
    model, damping, examples = mlp(4, 2, 0, torch.float64), 1e-2, 30
    images, labels = digits.images[:examples], digits.labels[:examples]
    gradients = directions.gradients_of(model, images, labels)
    actual = directions.DIRECTIONS[name](model, images, gradients, damping, torch.Generator().manual_seed(0))
    layers = approximations.rows_of(model, images, torch.Generator().manual_seed(0))
    per_layer = [torch.einsum("no,ni->noi", row.delta, row.h).flatten(1) for row in layers]
    g = [gradient.reshape(-1) for gradient in gradients.values()]
    if name == "natural gradient":
        whole = torch.cat(per_layer, dim=1)
        expected = list(damped(whole.mT @ whole / examples, damping, torch.cat(g)).split([len(x) for x in g]))
    else:
        expected = [layer_update(name, *each, damping) for each in zip(layers, per_layer, g, strict=True)]
    for update, right in zip(actual.values(), expected, strict=True):
        torch.testing.assert_close(update.reshape(-1), right, rtol=1e-7, atol=1e-9)


def test_the_kernel_of_outer_products_is_that_of_the_package(digits: Digits) -> None:
    model = mlp(5, 3, 0, torch.float64)
    images, labels = digits.images[:25], digits.labels[:25]
    gradients = directions.gradients_of(model, images, labels)
    fast = directions.exact(model, images, gradients, 1e-3, torch.Generator().manual_seed(0))
    fisher = Fisher.of(model, images, kind="mc", generator=torch.Generator().manual_seed(0))
    for update, right in zip(fast.values(), fisher.solve(gradients, 1e-3).values(), strict=True):
        torch.testing.assert_close(update, right, rtol=1e-8, atol=1e-10)


def damped(matrix: torch.Tensor, damping: float, g: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), g)


def layer_update(
    name: str, layer: approximations.Rows, vectors: torch.Tensor, g: torch.Tensor, damping: float
) -> torch.Tensor:
    n = len(layer.h)
    if name == "block-diagonal":
        return damped(vectors.mT @ vectors / n, damping, g)
    a, b = layer.h.mT @ layer.h / n, layer.delta.mT @ layer.delta / n
    eye_a, eye_b = torch.eye(len(a), dtype=a.dtype), torch.eye(len(b), dtype=b.dtype)
    if name == "FOOF":
        return torch.linalg.solve(torch.kron(eye_b, a + damping * eye_a), g)
    if name == "K-FAC":
        pi = torch.sqrt((a.trace() / len(a)) / (b.trace() / len(b)))
        return torch.linalg.solve(torch.kron(b + damping**0.5 / pi * eye_b, a + pi * damping**0.5 * eye_a), g)
    return damped(torch.kron(b, a), damping, g)


def test_tuning_follows_a_valley_beyond_its_ranges_with_a_fixed_number_of_trials() -> None:
    trials = []

    def score(values: dict[str, float], seed: int) -> float:
        trials.append(values)
        x, y = (math.log10(value) for value in values.values())
        return math.inf if x > 1.2 else (x - 1.1) ** 2 + (y - 0.3) ** 2

    best = tune(score, {"a": (1e-3, 10.0), "b": (1e-2, 1e2)}, seeds=(1, 2))
    assert math.log10(best["a"]) == pytest.approx(1.1, abs=0.26)
    assert math.log10(best["b"]) == pytest.approx(0.3, abs=0.26)
    assert len({tuple(values.values()) for values in trials}) <= TRIALS
    assert len(trials) == 25 + 2 * (9 + 8)


def test_a_run_that_diverges_is_infinite(digits: Digits) -> None:
    optimizer = torch.optim.SGD(mlp(8, 2, 0, torch.float64).parameters(), lr=1e9)
    model = mlp(8, 2, 0, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    run = training.train(model, training.optimizer_step(optimizer), digits, steps=5, batch=16, seed=0)
    assert run.score == math.inf
    assert run.steps[-1] == 5


def test_scores_at_equal_time() -> None:
    run = Run((0, 1, 2), (10.0, 1.0, 0.1), (0.0, 1.0, 2.0), 0.9)
    assert run.score == pytest.approx(-1)
    assert run.score_after(1.5) == pytest.approx(0)
    assert run.score_after(-1) == math.inf


def test_kernel_regression_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x, y, tests = rng.normal(size=(30, 4)), rng.normal(size=(30, 2)), rng.normal(size=(7, 4))
    ridge = 30 * 0.1 * (x**2).sum(axis=1).mean()
    expected = KernelRidge(alpha=ridge, kernel="linear").fit(x, y).predict(tests)
    kernel, among = (torch.tensor(z @ x.T) for z in (tests, x))
    np.testing.assert_allclose(widths.kernel_solution(kernel, among, torch.tensor(y), 0.1).numpy(), expected)


def test_the_nngp_kernel_is_that_of_a_wide_network(digits: Digits) -> None:
    hidden = mlp(4000, 4, 0)[:-1]
    with torch.no_grad():
        features = hidden(digits.images[:30].float())
    empirical = (features @ features.mT / 4000).double()
    exact = widths.nngp_kernel(digits.images[:30], digits.images[:30], 3)
    scale = float((empirical * exact).sum() / exact.square().sum())
    assert float((empirical - scale * exact).norm() / (scale * exact).norm()) < 0.05


def test_exponents() -> None:
    by_width = {m: [3.0 * m**0.5, m**-1.0, 2.0] for m in (32, 64, 128)}
    assert exponents(by_width) == pytest.approx([0.5, -1.0, 0.0])


def mup_tables(shift: float, exponent: float) -> dict[str, object]:
    """Made-up measurements in which everything moves by a power of the width."""
    names = [f"{n}{c}, {p}" for n in ("K-FAC", "Shampoo") for c in ("", ", spectral control") for p in ("μP", "SP")]
    names += ["K-FAC, constant damping, SP"]
    best = {name: {32: [1.0] * 3, 256: [2.0**shift] * 3} for name in names}
    change = {"exponents": {seed: [exponent] * 4 for seed in range(3)}}
    zero = {"hidden_change": 0.0, "cosine_own_kernel": 1.0, "cosine_nngp_kernel": 0.99}
    random = {**zero, "hidden_change": 1.0}
    return {
        "widths": (32, 256),
        "feature_widths": (32, 256),
        "best_rate": best,
        "best_damping": best,
        "tuned_at_base": dict.fromkeys(names, 1.0),
        "scores_by_rate": {
            name: {32: {s: {1.0: -1.0} for s in range(3)}, 256: {s: {1.0: -1.0 + 0.1 * shift} for s in range(3)}}
            for name in names
        },
        "feature_change": dict.fromkeys(names, change),
        "last_layer": {1.0: change},
        "zero": [{"zero": {64: zero, 128: zero}, "random": {64: random, 128: random}}] * 3,
    }


def test_mup_claims_on_made_up_tables() -> None:
    still = {claim.key: claim.outcome for claim in mup_claims.claims_of(mup_tables(0.0, 0.0))}
    moving = {claim.key: claim.outcome for claim in mup_claims.claims_of(mup_tables(3.0, 0.5))}
    assert len(still) == len(mup_claims.claims_of(mup_tables(0.0, 0.0)))  # keys are unique
    for key in ("kfac-rate", "shampoo-features", "kfac-wider", "kfac-damping", "kfac-last-layer"):
        assert still[key] is Outcome.HOLDS
        assert moving[key] is Outcome.FAILS
    for key in ("kfac-rate-sp", "shampoo-features-sp", "kfac-damping-other"):
        assert still[key] is Outcome.FAILS
        assert moving[key] is Outcome.HOLDS


def made_up_runs(scores: dict[str, Sequence[float]]) -> dict[str, list[Run]]:
    return {
        name: [Run((0, 1), (1.0, 10**value), (0.0, 1.0), 1.0) for value in values] for name, values in scores.items()
    }


def test_race_claims_on_made_up_runs() -> None:
    names = [*tekfac.CONTESTANTS, *tekfac.LONGER]
    runs = made_up_runs({name: [-1.0, -1.01, -0.99] for name in names} | {"TEKFAC": [-2.0, -2.1, -1.9]})
    outcomes = {claim.key: claim.outcome for claim in tekfac.claims_of_race(runs)}
    assert outcomes["tekfac-first-order"] is Outcome.HOLDS
    assert outcomes["tekfac-siblings"] is Outcome.HOLDS
    runs = made_up_runs({name: [-1.0, -1.01, -0.99] for name in names} | {"TEKFAC": [-0.5, -0.6, -0.4]})
    assert {claim.outcome for claim in tekfac.claims_of_race(runs) if "tekfac" in claim.key} == {Outcome.FAILS}


def test_foof_claims_on_made_up_runs() -> None:
    worse = {name: [0.0, 0.01, -0.01] for name in directions.DIRECTIONS}
    runs = made_up_runs({**worse, "K-FAC": [-1.0, -1.02, -0.98], "FOOF": [-1.2, -1.21, -1.22]})
    angles = [[{"nearest": {"natural gradient": 0.2, "FOOF": 0.8}}]] * 3
    outcomes = {claim.key: claim.outcome for claim in foof.claims_of(runs, runs, runs, angles)}
    assert set(outcomes.values()) == {Outcome.HOLDS}
    drawn = {**runs, **made_up_runs({"K-FAC, standard damping": [0.5, -0.5, 0.0]})}
    outcomes = {claim.key: claim.outcome for claim in foof.claims_of(drawn, runs, runs, angles)}
    assert outcomes["foof-damping"] is Outcome.UNDECIDED
    turned = made_up_runs({**worse, "natural gradient": [-3.0, -3.01, -3.02]})
    outcomes = {claim.key: claim.outcome for claim in foof.claims_of(turned, turned, turned, angles)}
    assert outcomes["foof-beats-exact"] is outcomes["foof-large-fisher"] is Outcome.FAILS


def test_what_an_experiment_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = Claim("made-up", "0000.00000", "1", "it is so", "nothing", (compare("x", [1.0, math.inf], below=2.0),))
    draw: Callable[[Path], object] = lambda path: path.write_bytes(b"")  # noqa: E731
    findings = report.Findings((claim,), {"losses": {1: math.nan}}, draw)
    assert report.carry_out("made-up", lambda: findings, tmp_path / "new") == (claim,)
    record = json.loads((tmp_path / "new" / "made-up.json").read_text("utf-8"))
    assert record["claims"][0]["outcome"] == "not decided"
    assert record["tables"]["losses"]["1"] == "nan"
    assert "| It is so |" in (tmp_path / "new" / "made-up.md").read_text("utf-8")
    assert "not decided: it is so" in capsys.readouterr().out
