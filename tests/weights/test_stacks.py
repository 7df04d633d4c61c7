"""Layers of one shape as one stack: what a stack of k does is what k single ones do, to round-off."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.helpers import BOTH_ENDS, in_float64, llama, relative_error
from torch import Tensor, nn

import hf_so2
from hf_so2.curvature import EKFAC, FOOF, KFAC, SOAP, TEKFAC, TKFAC, Blocked, CurvatureBlock, KLShampoo, Muon, Shampoo
from hf_so2.damping import RULES, Damping
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.linalg import DecompositionError, spectral_norm
from hf_so2.linalg.power_iteration import orthonormal_by_cholesky
from hf_so2.methods.table import METHODS
from hf_so2.weights import stacks

SECOND_ORDER = tuple(name for name, method in METHODS.items() if method.block is not None)
# Newton-Schulz runs in bfloat16, and its rounding differs between one product and many.
TOLERANCE = dict.fromkeys(SECOND_ORDER, 1e-9) | {"muon": 2e-2}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "kfac": [{"exponent_a": 0.5, "exponent_b": 0.5}, {"precondition_biases": True}, {"fisher": "mc"}, BOTH_ENDS],
    "foof": [{"momentum": 0.0}],
    "ekfac": [{"moment_token_stride": 2}],
    "shampoo": [
        {"shampoo_exponent": 0.5},
        {"shampoo_accumulation": "sum"},
        {"shampoo_root": "newton"},
        {"block_size": 10},
        {"max_preconditioner_dim": 20},
    ],
    "kl_shampoo": [{"block_size": 10}, {"max_preconditioner_dim": 20}, {"split_heads": True}],
    "soap": [{"basis_tolerance": 0.05}, {"momentum_order": "after"}, {"block_size": 10}, {"nesterov": True}],
    "muon": [{"split_heads": True}],
}


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stacks on the CPU too; the sizes of those that were made."""
    sizes: list[int] = []

    class Counted(stacks.StackedState):
        def __init__(self, members: list[dict[str, Tensor]]) -> None:
            sizes.append(len(members))
            super().__init__(members)

    monkeypatch.setattr(stacks, "StackedState", Counted)
    monkeypatch.setattr(stacks, "stack_bytes", lambda device: 1 << 30)
    return sizes


def model_of_three_layers() -> nn.Module:
    return in_float64(llama(num_hidden_layers=3, attention_bias=True))


def trained(name: str, steps: int = 4, **options: Any) -> nn.Module:
    model = model_of_three_layers()
    chosen = {"lr": 0.01, "fallback_learning_rate": 0.001, **options}
    if "statistics" in METHODS[name].uses:
        chosen["preconditioner_update_steps"] = 2
    optimizer = hf_so2.build_optimizer(name, model, **chosen)
    for seed in range(steps):
        tokens = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        output = model(input_ids=tokens, labels=tokens)
        optimizer.sample_fisher(output.logits[:, :-1])
        output.loss.backward()
        optimizer.step()
    return model


def moved(model: nn.Module) -> Tensor:
    before = dict(model_of_three_layers().named_parameters())
    return torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()])


CASES = [
    *((name, {"norm_control": control}) for name in SECOND_ORDER for control in NORM_CONTROLS),
    *(
        (name, {"damping_rule": rule})
        for name in SECOND_ORDER
        for rule in ("spectral", "constant")
        if "damping" in METHODS[name].uses
    ),
    *((name, options) for name, alike in OPTIONS.items() for options in alike),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_stacked_layers_train_as_single_ones(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    single = moved(trained(name, **options))
    sizes = request.getfixturevalue("stacked")
    together = moved(trained(name, **options))
    # Three layers' query and output, or gate and up; by head two queries, a key and a value.
    assert max(sizes) == (12 if options.get("split_heads") else 6)
    assert relative_error(together, single) < TOLERANCE[name]


BLOCKS: list[CurvatureBlock] = [
    KFAC(0.9),
    KFAC(0.9, 0.5, 0.5),
    FOOF(0.9),
    TKFAC(0.9),
    EKFAC(0.9),
    TEKFAC(0.9),
    Shampoo(0.9),
    Shampoo(0.9, 0.5, True, "ema", frozenset("LR"), "newton"),
    Shampoo(0.9, sides=frozenset("R")),
    KLShampoo(0.9),
    KLShampoo(0.9, frozenset("L")),
    SOAP(0.9, full_every=2, tolerance=0.01),
    Blocked(KLShampoo(0.9), 3, (5, 4)),
    Muon(),
]


@settings(max_examples=5)
@given(seed=st.integers(0, 2**30), count=st.integers(1, 4), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{type(block).__name__}")
@pytest.mark.parametrize("rule", RULES)
def test_verbs_of_a_stack_are_those_of_its_members(
    block: CurvatureBlock, rule: str, seed: int, count: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    damping = Damping(rule, 1e-2)
    states = [block.init_state((5, 4), torch.device("cpu"), torch.float64) for _ in range(count)]
    for _ in range(3):
        gradients = [scale * draw(5, 4) for _ in states]
        rows = [(draw(20, 4), scale * draw(20, 5)) for _ in states]
        together = stacks.StackedState([{name: value.clone() for name, value in s.items()} for s in states])
        is_of_gradients = hasattr(block, "observe_gradient")
        if is_of_gradients:
            seen = block.observe_gradient(together, torch.stack(gradients))  # type: ignore[attr-defined]
        for index, (state, gradient, pair) in enumerate(zip(states, gradients, rows, strict=True)):
            if is_of_gradients:
                observation = block.observe_gradient(state, gradient)  # type: ignore[attr-defined]
                for name, value in observation.items():
                    assert relative_error(seen[name][index], value) < 1e-9
            else:
                observation = block.observe(state, *pair)  # type: ignore[attr-defined]
            block.update(state, observation)
        together = stacks.StackedState([{name: value.clone() for name, value in s.items()} for s in states])
        block.refresh(together, damping)
        stepped = block.precondition(together, torch.stack(gradients))
        for index, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
            block.refresh(state, damping)
            expected = block.precondition(state, gradient)
            tolerance = 2e-2 if isinstance(block, Muon) else 1e-8
            assert relative_error(stepped[index], expected) < tolerance


@pytest.mark.parametrize("name", ["kfac", "kl_shampoo", "soap"])
def test_one_layer_that_cannot_be_decomposed_costs_its_neighbours_nothing(
    name: str, stacked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of_three_layers()
    optimizer = hf_so2.build_optimizer(name, model, lr=0.01, preconditioner_update_steps=1)
    assert optimizer.curvature is not None
    layers = [layer for layer in optimizer.curvature.layers.values() if layer.name.endswith("q_proj.weight")]
    for seed in range(4):
        tokens = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if seed == 3:
            side = "A" if name == "kfac" else "L"
            layers[1].state[side].fill_(torch.nan)
        optimizer.step()
    assert [layer.refreshes for layer in layers] == [4, 3, 4]
    assert [layer.failures for layer in layers] == [0, 1, 0]
    assert max(stacked) == 6
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_norm_control_that_fails_for_one_leaves_out_one(
    stacked: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = itertools.count()

    def failing(matrix: Tensor, basis: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        if matrix.ndim == 3 or next(calls) == 1:
            raise DecompositionError("made up")
        return spectral_norm(matrix, basis, iterations)

    monkeypatch.setattr("hf_so2.engine.norm_control.spectral_norm", failing)
    model = trained("kfac", steps=1)
    before = model_of_three_layers()
    still = [
        name
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if torch.equal(new, old)
    ]
    assert len(still) == 1
    assert f"{still[0]}: norm control failed" in caplog.text


@settings(max_examples=30)
@given(seed=st.integers(0, 2**30), condition=st.floats(0, 6), scale=st.integers(-12, 12))
def test_columns_made_orthonormal_by_their_gram_matrix_span_the_same_space(
    seed: int, condition: float, scale: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(3, 40, 6, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)).Q
    columns = 10.0**scale * left @ torch.diag(torch.logspace(0, -condition, 6, dtype=torch.float64)) @ right
    made = orthonormal_by_cholesky(columns)
    assert relative_error(made.mT @ made, torch.eye(6).expand(3, 6, 6)) < 1e-2
    assert relative_error(made @ (made.mT @ columns), columns) < 1e-2


def test_columns_of_zeros_stay_zeros() -> None:
    assert not orthonormal_by_cholesky(torch.zeros(2, 5, 3)).any()
