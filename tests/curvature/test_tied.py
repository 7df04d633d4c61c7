"""A weight tied between embedding and head, against dense sums of two Kronecker products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from shared.dense_fisher import dense_preconditioner, eye, relative, stand_still
from shared.helpers import (
    BOTH_ENDS,
    VOCABULARY,
    dense_factors,
    in_float64,
    llama,
    numpy_damping,
    tied_llama,
    token_loss_sum,
)
from torch import Tensor, nn

import hf_so2
from hf_so2.curvature import Tied
from hf_so2.damping import Damping
from hf_so2.layers.sampled_labels import generator_for

METHODS = ("kfac", "ekfac", "tkfac", "tekfac")
DIAGONAL = {**BOTH_ENDS, "head_output_factor": "diagonal"}
NAME = "model.embed_tokens.weight"

Rows = dict[str, tuple[np.ndarray, np.ndarray]]


def unpadded() -> nn.Module:
    """In float64, and without a row of zeros, which the least of steps moves."""
    return in_float64(tied_llama(pad_token_id=None))


def batch(rows: int = 3, length: int = 8) -> tuple[Tensor, Tensor]:
    """The last entries of the vocabulary never occur."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY - 3, (2, rows, length), generator=generator)
    return tokens, targets


def rows_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Rows:
    """`h` and `δ` of both ends, from a model without hooks; one-hot vectors written out."""
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    dense = dense_factors(model, ends, lambda out, rows: token_loss_sum(out.logits, rows[1]), data)
    one_hot = np.eye(VOCABULARY)[data[0].reshape(-1).numpy()]
    if ends["embedding"].padding_idx is not None:
        one_hot[:, ends["embedding"].padding_idx] = 0  # it has no gradient
    return {
        "embedding": (one_hot, dense["embedding"].deltas.numpy()),
        "head": (dense["head"].inputs.numpy(), dense["head"].deltas.numpy()),
    }


def moment(rows: np.ndarray, count: int) -> np.ndarray:
    return rows.T @ rows / count


def dense_sum(factors: dict[str, np.ndarray], rule: str, epsilons: tuple[float, float], *, uniform: bool) -> np.ndarray:
    """The damped block on `vec(G)` with rows stacked; `a` and `b` are full diagonal matrices here."""
    a_e, b_e, a_h, b_h = (factors[key] for key in ("A", "B", "head_A", "head_B"))
    if uniform:
        b_h = np.eye(len(b_h)) * np.trace(b_h) / len(b_h)
    rho_a, rho_b = numpy_damping(rule, epsilons[0], a_e, b_e)
    rho_in, rho_out = numpy_damping(rule, epsilons[1], a_h, b_h)
    if rule == "trace":  # a diagonal is judged per row
        rho_a, rho_out = rho_a / len(a_e), rho_out / len(b_h)
    embedding = np.kron(b_e + rho_b * eye(b_e), a_e + rho_a * eye(a_e))
    return embedding + np.kron(a_h + rho_in * eye(a_h), b_h + rho_out * eye(b_h))


def random_case(
    seed: int = 0, hidden: int = 4, size: int = 7, beta: float = 0.6
) -> tuple[Tied, dict[str, Tensor], Any]:
    """A block after three updates and, bias-corrected in NumPy, the averages that it should hold."""
    rng, block = np.random.default_rng(seed), Tied(beta)
    state = block.init_state((hidden, size), torch.device("cpu"), torch.float64)
    averages: dict[str, np.ndarray] = {}
    for _ in range(3):
        tokens = rng.integers(0, size - 2, 9)
        mixing = rng.normal(size=(hidden, hidden))
        deltas, h = rng.normal(size=(9, hidden)) @ mixing, rng.normal(size=(9, hidden)) * np.arange(1, hidden + 1)
        logits = rng.normal(size=(9, size)) * 0.1
        seen = {
            "": block.ends[""].observe(state, torch.from_numpy(tokens), torch.from_numpy(deltas)),
            "head_": block.ends["head_"].observe(
                {name: state[f"head_{name}"] for name in "AB"}, torch.from_numpy(h), torch.from_numpy(logits)
            ),
        }
        block.update(state, {p + name: total / 9 for p, sums in seen.items() for name, total in sums.items()})
        one_hot = np.eye(size)[tokens]
        new = {"A": moment(one_hot, 9), "B": moment(deltas, 9), "head_A": moment(h, 9)}
        new["head_B"] = np.diag(np.diag(moment(logits, 9)))
        averages = {key: beta * averages.get(key, 0.0 * value) + (1 - beta) * value for key, value in new.items()}
    return block, state, {key: value / (1 - beta**3) for key, value in averages.items()}


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
def test_the_operator_is_the_inverse_of_the_dense_sum(rule: str, uniform: bool) -> None:
    block, state, averages = random_case()
    block = Tied(block.beta, uniform)
    block.refresh(state, Damping(rule, 0.3, head=Damping(rule, 0.02)))
    expected = np.linalg.inv(dense_sum(averages, rule, (0.3, 0.02), uniform=uniform))
    assert relative(dense_preconditioner(block, state, (4, 7)), expected) < 1e-10


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_factors_and_operator_of_a_tied_llama(name: str, uniform: bool) -> None:
    data, settings = batch(), BOTH_ENDS if uniform else DIAGONAL
    optimizer = stand_still(name, unpadded(), data, damping=0.02, embedding_damping=0.3, **settings)
    ends = rows_of(unpadded(), data)
    (tokens, deltas), (h, logits) = ends["embedding"], ends["head"]
    expected = {"A": moment(tokens, 24), "B": moment(deltas, 24), "head_A": moment(h, 24)}
    expected["head_B"] = np.diag(np.diag(moment(logits, 24)))
    entry = optimizer.curvature.layers[NAME]
    for key, value in expected.items():
        found = entry.state[key] / entry.state["head_weight" if "head" in key else "weight"]
        assert relative(found if found.ndim == 2 else found.diag(), value) < 1e-11, key
    block = dense_sum(expected, "constant", (0.3, 0.02), uniform=uniform)
    assert relative(dense_preconditioner(entry.block, entry.state, entry.shape), np.linalg.inv(block)) < 1e-10


def test_inputs_average_over_rows_and_gradients_over_the_tokens_of_the_loss() -> None:
    """A position without a label counts at the head nowhere, at the embedding if a later one looks at it."""
    tokens, targets = batch()
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    counted = (mask == 1) & (torch.arange(8) > 2)
    labels = torch.where(counted, targets, -100)
    model, number = in_float64(tied_llama()), int(counted.sum())
    optimizer = hf_so2.build_optimizer("kfac", model, beta2=0.0, **DIAGONAL)
    optimizer.announce(tokens=number, gradient_scale=1 / number)
    (token_loss_sum(model(tokens).logits, labels) / number).backward()
    optimizer.step()
    kept = mask.reshape(-1).bool().numpy()
    ends = rows_of(in_float64(tied_llama()), (tokens, labels))
    h, logits = (rows[counted.reshape(-1).numpy()] for rows in ends["head"])
    state = optimizer.curvature.layers[NAME].state
    assert relative(state["head_A"], moment(h, len(h))) < 1e-11
    assert relative(state["head_B"], (logits**2).sum(0) / number) < 1e-11
    ids = tokens.reshape(-1)[kept].numpy()
    assert relative(state["A"], np.bincount(ids[ids > 0], minlength=VOCABULARY) / (ids > 0).sum()) < 1e-12
    assert relative(state["B"], moment(ends["embedding"][1][kept & (tokens.reshape(-1).numpy() > 0)], number)) < 1e-11


def test_reduced_sequences_are_those_of_the_head() -> None:
    data = batch()
    optimizer = stand_still("kfac", unpadded(), data, steps=1, weight_sharing="reduce", **DIAGONAL)
    ends = rows_of(unpadded(), data)
    h, logits = (rows.reshape(3, 8, -1) for rows in ends["head"])
    state = optimizer.curvature.layers[NAME].state
    assert relative(state["head_A"], moment(h.mean(1), 3)) < 1e-11
    assert relative(state["head_B"], (logits.sum(1) ** 2).sum(0) / 24) < 1e-11
    assert relative(state["A"], np.diag(moment(ends["embedding"][0], 24))) < 1e-12


def test_sampled_labels_reach_both_ends() -> None:
    tokens, _ = batch()
    model, twin = in_float64(tied_llama()), in_float64(tied_llama())
    optimizer = hf_so2.build_optimizer("kfac", model, beta2=0.0, fisher="mc", **DIAGONAL)
    logits = model(tokens).logits
    optimizer.sample_fisher(logits)
    logits.square().mean().backward()
    optimizer.step()
    probabilities = twin(tokens).logits.detach().reshape(-1, VOCABULARY).softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=generator_for(0, 0, 0, tokens.device))[:, 0]
    ends, state = rows_of(twin, (tokens, labels)), optimizer.curvature.layers[NAME].state
    delta = probabilities.numpy() - np.eye(VOCABULARY)[labels.numpy()]
    assert relative(state["head_B"], (delta**2).mean(0)) < 1e-11
    kept = (tokens.reshape(-1) != 0).numpy()
    assert relative(state["B"], moment(ends["embedding"][1][kept], 24)) < 1e-11


@pytest.mark.parametrize("seed", range(5))
def test_signs_order_and_mixtures_of_equal_directions_change_nothing(seed: int) -> None:
    block, state, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    gradient = torch.from_numpy(rng.normal(size=(4, 7)))
    block.refresh(state, Damping("trace", 0.1))
    expected = block.precondition(state, gradient)
    order = torch.from_numpy(rng.permutation(4))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], 4))
    state["common_basis"].copy_(state["common_basis"][:, order] * signs)
    state["share"].copy_(state["share"][order])
    torch.testing.assert_close(block.precondition(state, gradient), expected, rtol=1e-12, atol=1e-14)

    # Proportional factors have one share in all directions: any rotation of the basis is one as well.
    state["B"].copy_(state["head_A"])
    block.refresh(state, Damping("trace", 0.1))
    expected = block.precondition(state, gradient)
    rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(4, 4)))).Q
    state["common_basis"].copy_(state["common_basis"] @ rotation)
    torch.testing.assert_close(block.precondition(state, gradient), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_rotated_hidden_dimensions_get_the_rotated_update(seed: int) -> None:
    block, state, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    gradient = torch.from_numpy(rng.normal(size=(4, 7)))
    rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(4, 4)))).Q
    rotated = {key: value.clone() for key, value in state.items()}
    for key in ("B", "head_A"):
        rotated[key] = rotation @ rotated[key] @ rotation.mT
    for each in (state, rotated):
        block.refresh(each, Damping("trace", 0.01))
    actual = block.precondition(rotated, rotation @ gradient)
    torch.testing.assert_close(actual, rotation @ block.precondition(state, gradient), rtol=1e-10, atol=1e-12)


def test_what_a_refresh_writes_is_all_that_another_rank_needs() -> None:
    block, state, _ = random_case()
    other = {key: value.clone() for key, value in state.items()}
    block.refresh(state, Damping("trace", 0.1))
    for key in block.refreshed:
        other[key].copy_(state[key])
    gradient = torch.ones(4, 7, dtype=torch.float64)
    assert torch.equal(block.precondition(other, gradient), block.precondition(state, gradient))


@pytest.mark.parametrize("silent", ["", "head_"])
def test_an_end_that_says_nothing_leaves_the_block_of_the_other(silent: str) -> None:
    block, state, averages = random_case()
    for key in ("A", "B", "weight"):
        state[silent + key].zero_()
    rule = Damping("constant", 0.3)
    block.refresh(state, rule)
    a, b = (averages["A"], averages["B"]) if silent else (averages["head_B"], averages["head_A"])
    expected = np.linalg.inv(np.kron(b + 0.3 * eye(b), a + 0.3 * eye(a)))
    assert relative(dense_preconditioner(block, state, (4, 7)), expected) < 1e-10
    for key in ("B", "head_B"):
        state[key].zero_()
    block.refresh(state, rule)
    gradient = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(block.precondition(state, gradient), gradient)


def test_a_model_fed_with_embeddings_is_preconditioned_by_its_head() -> None:
    model = tied_llama()
    optimizer = hf_so2.build_optimizer("kfac", model, **BOTH_ENDS)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        embedded, labels = torch.randn(2, 6, 16, generator=generator), torch.ones(2, 6, dtype=torch.long)
        before = model.lm_head.weight.detach().clone()
        model(inputs_embeds=embedded, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.curvature.layers[NAME].state
    assert float(state["weight"]) == 0 < float(state["head_weight"])
    assert torch.isfinite(model.lm_head.weight).all()
    assert not torch.equal(model.lm_head.weight, before)


def test_spectral_control_bounds_what_comes_out_at_either_end() -> None:
    """The larger of the root mean square changes of vectors looked up and of logits is the learning rate."""
    data, model = batch(), in_float64(tied_llama())
    before = model.lm_head.weight.detach().clone()
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.02, **BOTH_ENDS)
    (token_loss_sum(model(data[0]).logits, data[1]) / 24).backward()
    optimizer.step()
    moved = (model.lm_head.weight.detach() - before).numpy()
    ends = rows_of(in_float64(tied_llama()), data)
    kept = data[0][data[0] != 0].numpy()
    sizes = np.sqrt(np.mean(moved[kept] ** 2)), np.sqrt(np.mean((ends["head"][0] @ moved.T) ** 2))
    assert max(sizes) == pytest.approx(0.02, rel=1e-10)
    assert sizes[0] < sizes[1]


def test_the_log_has_both_ends() -> None:
    block, state, averages = random_case()
    model = tied_llama()
    dampings = {"damping_rule": "constant", "damping": 0.02, "embedding_damping": 1.0}
    optimizer = hf_so2.build_optimizer("kfac", model, **dampings, **DIAGONAL)
    model(input_ids=batch()[0], labels=batch()[0]).loss.backward()
    optimizer.step()
    layer = optimizer.curvature.layers[NAME]
    layer.block, layer.state = block, state
    block.refresh(state, layer.damping)
    log = {key.rpartition("/")[2]: value for key, value in optimizer.telemetry().items() if "/embedding/" in key}
    for key, value in averages.items():
        assert log[f"trace_{key}"] == pytest.approx(np.trace(value))
        assert log[f"damping_{key}"] == pytest.approx(0.02 if "head" in key else 1.0)
    a_e, b_e, a_h, b_h = (averages[key] + (0.02 if "head" in key else 1.0) * eye(averages[key]) for key in averages)
    mean = b_e * np.trace(a_e) / 7 + a_h * np.trace(b_h) / 7
    assert log["condition"] == pytest.approx(np.linalg.cond(mean), rel=1e-6)


def test_curvature_along_a_change_is_that_of_the_undamped_sum() -> None:
    block, state, averages = random_case()
    change = np.random.default_rng(3).normal(size=(4, 7))
    dense = np.kron(averages["B"], averages["A"]) + np.kron(averages["head_A"], averages["head_B"])
    found = block.curvature_along(state, torch.from_numpy(change))
    assert float(found) == pytest.approx(change.ravel() @ dense @ change.ravel(), rel=1e-12)


def layer_of(name: str = "kfac", model: nn.Module | None = None, **settings: Any) -> Any:
    optimizer = hf_so2.build_optimizer(name, tied_llama() if model is None else model, **BOTH_ENDS | settings)
    return optimizer.curvature.layers[NAME]


def test_each_end_has_the_damping_of_a_weight_of_its_own() -> None:
    damping = layer_of(damping=0.02, embedding_damping=0.5, damping_overrides=["lm_head=spectral:0.1"]).damping
    assert (damping.rule, damping.epsilon) == ("trace", 0.5)
    assert (damping.head.rule, damping.head.epsilon) == ("spectral", 0.1)
    assert layer_of("ekfac", damping=1e-4).damping.head.epsilon == 1e-2  # one of two factors, not their product
    scaled = damping.scaled(0.5)
    assert (scaled.epsilon, scaled.head.epsilon) == (0.25, 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_by_default_neither_end_is_damped_beyond_the_other(name: str) -> None:
    """An embedding of its own has a damping of 1, which in the sum would be all that there is."""
    damping = layer_of(name).damping
    assert damping.epsilon == damping.head.epsilon
    untied = hf_so2.build_optimizer(name, llama(), **BOTH_ENDS).curvature.layers
    assert untied[NAME].damping.epsilon == 1.0
    assert damping.head.epsilon == untied["lm_head.weight"].damping.epsilon


def test_by_default_the_head_is_heard_in_the_sum() -> None:
    """Its share in the average token's block is the dense one's; an embedding's own damping of 1 leaves it little."""
    data, ends, found = batch(), rows_of(unpadded(), batch()), []
    a_e, b_e = (moment(rows, 24) for rows in ends["embedding"])
    a_h, b_h = (moment(rows, 24) for rows in ends["head"])
    for given, epsilon in ((None, 1e-3), (1.0, 1.0)):
        settings = {"damping_rule": "trace", "damping": 1e-3, "embedding_damping": given}
        share = stand_still("kfac", unpadded(), data, **settings, **BOTH_ENDS).curvature.layers[NAME].state["share"]
        embedding = np.trace(a_e) * (1 + epsilon) * (b_e + epsilon * np.trace(b_e) * eye(b_e))
        head = np.trace(b_h) * (1 + 1e-3) * (a_h + 1e-3 * np.trace(a_h) * eye(a_h))
        expected = np.linalg.eigvals(np.linalg.solve(embedding + head, head)).real
        np.testing.assert_allclose(np.sort(share.numpy()), np.sort(expected), rtol=1e-8)
        found.append(expected.mean())
    assert found[1] < 0.1 < 0.4 < found[0]


def test_damping_follows_both_ends_over_the_width() -> None:
    """μP divides the head's inputs by the growth m: `A_h` falls like m / m², as constant damping does."""
    narrow, wide = tied_llama(16), tied_llama(64)
    layers = [
        layer_of("kfac_mup", model, base_config=llama(16, tie_word_embeddings=True).config) for model in (narrow, wide)
    ]
    for each in layers:
        assert each.damping.epsilon == each.damping.head.epsilon == 1e-3
    small, large = (each.damping for each in layers)
    assert (small.multiplier_a, small.multiplier_b, small.head.multiplier_a, small.head.multiplier_b) == (1, 1, 1, 1)
    assert (large.multiplier_a, large.multiplier_b) == (1, 1 / 4)
    assert (large.head.multiplier_a, large.head.multiplier_b) == (1 / 4, 1)
    traces = []
    for model in (narrow, wide):
        inputs: list[Tensor] = []
        handle = model.lm_head.register_forward_hook(
            lambda module, args, out, into=inputs: into.append(args[0].detach())
        )
        model(batch()[0])
        handle.remove()
        traces.append(float(inputs[0].square().sum(-1).mean()))
    assert traces[1] / traces[0] == pytest.approx(1 / 4, rel=1e-3)


def test_the_shampoo_family_sees_the_sum_of_both_gradients() -> None:
    model, data = in_float64(tied_llama()), batch()
    optimizer = hf_so2.build_optimizer("shampoo", model, beta2=0.0, **BOTH_ENDS)
    (token_loss_sum(model(data[0]).logits, data[1]) / 24).backward()
    gradient = model.lm_head.weight.grad.clone()
    optimizer.step()
    ends = rows_of(in_float64(tied_llama()), data)
    kept = (data[0].reshape(-1, 1) != 0).numpy()
    dense = sum(np.einsum("tv,tm->vm", *pair) for pair in (
        (ends["embedding"][0], ends["embedding"][1] * kept), (ends["head"][1], ends["head"][0])
    )) / 24  # fmt: skip
    assert relative(gradient, dense) < 1e-11
    assert relative(optimizer.curvature.layers[NAME].state["L"], dense.T @ dense) < 1e-11
