"""The experiments' parts against definitions written out here, and the claims on made-up tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import nn

from hf_so2.natural_gradient import Fisher
from hf_so2.papers import data, report, training
from hf_so2.papers.data import Examples
from hf_so2.papers.foof import claims as foof_claims
from hf_so2.papers.foof import directions
from hf_so2.papers.models import llama, mlp, vit
from hf_so2.papers.mup import claims as mup_claims
from hf_so2.papers.mup import kernel
from hf_so2.papers.mup.curves import exponents
from hf_so2.papers.races import Contest, Race
from hf_so2.papers.tekfac import approximations, race
from hf_so2.papers.training import TRIALS, Run, tune
from hf_so2.papers.verdict import Claim, Outcome, compare


@pytest.fixture(scope="module")
def digits() -> Examples:
    return data.digits(torch.float64)


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


def test_rows_multiply_to_the_gradient(digits: Examples) -> None:
    """δ and h are those of the drawn labels: their mean product is the gradient for the same draw."""
    model = mlp(6, 3, 0, torch.float64)
    images = digits.inputs[:50]
    found = approximations.rows_of(model, images, torch.Generator().manual_seed(3))
    drawn = torch.multinomial(model(images).softmax(dim=1), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    nn.functional.cross_entropy(model(images), drawn).backward()
    for layer, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(layer.delta.mT @ layer.h / 50, parameter.grad)


@pytest.mark.parametrize("name", ["K-FAC", "K-FAC, standard damping", "FOOF", "block-diagonal", "natural gradient"])
def test_directions_are_what_they_are_called(name: str, digits: Examples) -> None:
    model, damping, examples = mlp(4, 2, 0, torch.float64), 1e-2, 30
    images, labels = digits.inputs[:examples], digits.labels[:examples]
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


def test_the_kernel_of_outer_products_is_that_of_the_package(digits: Examples) -> None:
    model = mlp(5, 3, 0, torch.float64)
    images, labels = digits.inputs[:25], digits.labels[:25]
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


def test_a_run_that_diverges_is_infinite(digits: Examples) -> None:
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
    across, among = (torch.tensor(z @ x.T) for z in (tests, x))
    np.testing.assert_allclose(kernel.kernel_solution(across, among, torch.tensor(y), 0.1).numpy(), expected)


def test_the_nngp_kernel_is_that_of_a_wide_network(digits: Examples) -> None:
    hidden = mlp(4000, 4, 0)[:-1]
    with torch.no_grad():
        features = hidden(digits.inputs[:30].float())
    empirical = (features @ features.mT / 4000).double()
    exact = kernel.nngp_kernel(digits.inputs[:30], digits.inputs[:30], 3)
    scale = float((empirical * exact).sum() / exact.square().sum())
    assert float((empirical - scale * exact).norm() / (scale * exact).norm()) < 0.05


def test_exponents() -> None:
    by_width = {m: [3.0 * m**0.5, m**-1.0, 2.0] for m in (32, 64, 128)}
    assert exponents(by_width) == pytest.approx([0.5, -1.0, 0.0])


def mup_tables(shift: float, exponent: float) -> dict[str, object]:
    """Made-up measurements in which everything moves by a power of the width."""
    names = [f"{n}{c}" for n in ("K-FAC", "Shampoo") for c in (", μP", ", SP", ", spectral control, μP")]

    def curve(best: float, level: float) -> dict[int, float]:
        return {step: level + 0.1 * (step - best) ** 2 - 0.1 * best**2 for step in range(-4, 5)}

    scores = {
        name: {
            32: {s: curve(0.0, -1.0) for s in range(3)},
            256: {s: curve(shift, -1.0 + 0.1 * shift) for s in range(3)},
        }
        for name in names
    }
    network = {"widths": (32, 256), "run": "made up", "rates": scores, "dampings": scores}
    change = {"exponents": {seed: [exponent] * 4 for seed in range(3)}}
    zero = {"hidden_change": 0.0, "cosine_own_kernel": 1.0, "cosine_nngp_kernel": 0.99}
    random = {**zero, "hidden_change": 1.0}
    return {
        "networks": {"MLP": network, "Llama": {**network, "dampings": {}}},
        "feature_widths": (32, 256),
        "feature_change": dict.fromkeys(names, change),
        "last_layer": {1.0: change},
        "zero": [{"zero": {64: zero, 128: zero}, "random": {64: random, 128: random}}] * 3,
    }


def test_mup_claims_on_made_up_tables() -> None:
    still = {claim.key: claim.outcome for claim in mup_claims.claims_of(mup_tables(0.0, 0.0))}
    moving = {claim.key: claim.outcome for claim in mup_claims.claims_of(mup_tables(3.0, 0.5))}
    assert len(still) == len(mup_claims.claims_of(mup_tables(0.0, 0.0)))  # keys are unique
    for key in ("kfac-rate-mlp", "kfac-rate-llama", "shampoo-features", "kfac-wider-mlp", "kfac-damping-mlp",
                "kfac-last-layer"):  # fmt: skip
        assert still[key] is Outcome.HOLDS, key
        assert moving[key] is Outcome.FAILS, key
    for key in ("kfac-rate-sp-mlp", "shampoo-rate-sp-llama", "shampoo-features-sp", "kfac-damping-sp-mlp"):
        assert still[key] is Outcome.FAILS, key
        assert moving[key] is Outcome.HOLDS, key


def made_up_race(scores: dict[str, Sequence[float]]) -> Race:
    runs = {
        name: [Run((0, 1), (1.0, 10**value), (0.0, 1.0), 1.0) for value in values] for name, values in scores.items()
    }
    return Race({}, runs)


@pytest.mark.parametrize("ground", race.GROUNDS, ids=lambda ground: ground.name)
def test_race_claims_on_made_up_runs(ground: race.Ground) -> None:
    alike = {name: [-1.0, -1.01, -0.99] for name in ground.contest().ranges}
    ahead, behind = (
        {claim.key: claim.outcome for claim in race.claims_of(ground, made_up_race({**alike, "TEKFAC": scores}))}
        for scores in ([-2.0, -2.1, -1.9], [-0.5, -0.6, -0.4])
    )
    of_tekfac = [key for key in ahead if key.startswith("tekfac")]
    assert {ahead[key] for key in of_tekfac} == {Outcome.HOLDS}
    assert {behind[key] for key in of_tekfac} == {Outcome.FAILS}


def test_foof_claims_on_made_up_runs() -> None:
    worse = {name: [0.0, 0.01, -0.01] for name in directions.DIRECTIONS}
    angles = [[{"nearest": {"natural gradient": 0.2, "FOOF": 0.8}}]] * 3

    def outcomes(scores: dict[str, list[float]], of_batch: dict[str, list[float]] | None = None) -> dict[str, Outcome]:
        races = dict.fromkeys(("one batch", "large Fisher", "package, MLP", "package, ViT"), made_up_race(scores))
        races |= {"one batch": made_up_race(of_batch or scores)}
        return {claim.key: claim.outcome for claim in foof_claims.claims_of(races, angles)}

    right = {**worse, "K-FAC": [-1.0, -1.02, -0.98], "FOOF": [-1.2, -1.21, -1.22]}
    assert set(outcomes(right).values()) == {Outcome.HOLDS}
    drawn = outcomes(right, {**right, "K-FAC, standard damping": [0.5, -0.5, 0.0]})
    assert drawn["foof-damping"] is Outcome.UNDECIDED
    turned = outcomes({**worse, "natural gradient": [-3.0, -3.01, -3.02]})
    assert turned["foof-beats-exact"] is turned["foof-large-fisher"] is Outcome.FAILS
    slower = outcomes({**right, "FOOF": [-0.5, -0.51, -0.52]})
    assert slower["foof-per-step-vit"] is slower["foof-in-time-mlp"] is Outcome.FAILS


@pytest.mark.parametrize("build", [mlp, vit, llama], ids=lambda build: build.__name__)
def test_networks_follow_their_seed_and_leave_the_generator_alone(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    untouched = torch.randn(3)
    torch.manual_seed(0)
    first, second, other = build(32, 2, 5), build(32, 2, 5), build(32, 2, 6)
    assert torch.equal(torch.randn(3), untouched)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_examples_are_judged_where_they_say() -> None:
    images, text = data.digits(), data.text()
    assert images.judged[0] is images.inputs
    assert text.judged[0] is text.test_inputs
    # A label is the byte after: the next input's, wherever a block goes on.
    assert torch.equal(text.labels[0, :-1], text.inputs[0, 1:])
    assert int(text.labels[0, -1]) == int(text.inputs[1, 0])
    (x, y), *_ = text.batches(2, 3, seed=0)
    assert llama(16, 1, 0)(x).shape == (*y.shape, data.BYTES)
    assert vit(8, 1, 0)(images.inputs[:3]).shape == (3, data.CLASSES)


def test_a_contest_does_not_depend_on_the_number_of_workers() -> None:
    def run(name: str, values: Mapping[str, float], seed: int) -> Run:
        off = (math.log10(values["a"]) - (0.5 if name == "x" else -0.5)) ** 2 + math.log10(values["b"]) ** 2
        return Run((0, 1), (1.0, 10 ** (off - 2 + 0.01 * seed)), (0.0, 1.0), 1.0)

    contest = Contest({name: {"a": (1e-2, 1e2), "b": (1e-2, 1e2)} for name in "xy"}, run, seeds=(0, 1, 2))
    alone, together = contest.hold(1), contest.hold(2)
    assert alone == together
    assert math.log10(alone.best["x"]["a"]) == pytest.approx(0.5, abs=0.26)
    assert alone.loss_over("x", "y", below=1.0).outcome is Outcome.HOLDS
    assert alone.loss_in_time("x", "y", until="y", above=1.0).outcome is Outcome.FAILS
    assert alone.time_over("x", "y", below=1.0).mean == 1.0


def test_what_an_experiment_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = Claim("made-up", "0000.00000", "1", "it is so", "nothing", (compare("x", [1.0, math.inf], below=2.0),))
    draw: Callable[[Path], object] = lambda path: path.write_bytes(b"")  # noqa: E731
    findings = report.Findings((claim,), {"losses": {1: math.nan}}, draw)
    assert report.carry_out("made-up", lambda workers: findings, tmp_path / "new", workers=1) == (claim,)
    record = json.loads((tmp_path / "new" / "made-up.json").read_text("utf-8"))
    assert record["claims"][0]["outcome"] == "not decided"
    assert record["tables"]["losses"]["1"] == "nan"
    assert "| It is so |" in (tmp_path / "new" / "made-up.md").read_text("utf-8")
    assert "not decided: it is so" in capsys.readouterr().out
