"""Zero, rank-one, tiny, huge and broken gradients: what comes out is finite, and what went wrong passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared.shampoo_reference import fresh_state, relative
from torch import Tensor

from hf_so2.curvature.base import GradientBlock, State
from hf_so2.curvature.kl_shampoo import KLShampoo
from hf_so2.curvature.muon import Muon
from hf_so2.curvature.parts.blocked import Blocked
from hf_so2.curvature.shampoo import Shampoo
from hf_so2.curvature.soap import SOAP
from hf_so2.damping import RULES, Damping
from hf_so2.linalg import DecompositionError

SHAPE = (6, 4)
METHODS: dict[str, Any] = {
    "shampoo": Shampoo(0.9),
    "shampoo_newton": Shampoo(0.9, root="newton"),
    "shampoo_half": Shampoo(0.9, 0.5),
    "shampoo_normalized": Shampoo(0.9, 0.5, normalized=True),
    "shampoo_sum": Shampoo(0.9, accumulate="sum"),
    "shampoo_left": Shampoo(0.9, sides=frozenset("L")),
    "soap": SOAP(0.9, full_every=2),
    "soap_right": SOAP(0.9, sides=frozenset("R")),
    "kl_shampoo": KLShampoo(0.9),
    "kl_shampoo_left": KLShampoo(0.9, frozenset("L")),
    "muon": Muon(),
    "blocked": Blocked(Shampoo(0.9), 3, SHAPE),
}
EVERY = pytest.mark.parametrize("name", METHODS)
DAMPING = Damping("trace", 1e-4)


def step(block: GradientBlock, state: State, gradient: Tensor, damping: Damping = DAMPING) -> Tensor:
    """As the optimizer does: statistics that are not finite are left out, a failed refresh keeps what there was."""
    observation = block.observe_gradient(state, gradient)
    if all(bool(torch.isfinite(value).all()) for value in observation.values()):
        block.update(state, observation)
    if state["weight"] > 0:
        before = {name: value.clone() for name, value in state.items()}
        try:
            block.refresh(state, damping)
        except DecompositionError:
            assert all(torch.equal(state[name], value) for name, value in before.items())
    return block.precondition(state, gradient)


def steps(block: GradientBlock, state: State, scale: float = 1.0, count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [step(block, state, scale * torch.randn(SHAPE, generator=generator)) for _ in range(count)]


def assert_healthy(block: GradientBlock, state: State) -> None:
    """Everything is finite, and ordinary gradients soon give updates again that are neither zero nor out of bounds."""
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    last = steps(block, state, count=6, seed=1)[-1]
    assert torch.isfinite(last).all()
    assert last.any()


def test_states_are_in_the_dtype_asked_for() -> None:
    for block in METHODS.values():
        assert {value.dtype for value in fresh_state(block, SHAPE, torch.float32).values()} == {torch.float32}


@pytest.mark.parametrize("rule", RULES)
@EVERY
def test_zero_gradients(name: str, rule: str) -> None:
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    for _ in range(4):
        update = step(block, state, torch.zeros(SHAPE), Damping(rule, 1e-4))
        assert not update.any()
        assert torch.isfinite(update).all()
    assert_healthy(block, state)


@pytest.mark.parametrize("name", ["shampoo", "shampoo_newton", "shampoo_half", "shampoo_normalized", "kl_shampoo"])
def test_without_information_the_gradient_stays_as_it_is(name: str) -> None:
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    step(block, state, torch.zeros(SHAPE))
    gradient = torch.randn(SHAPE)
    assert relative(block.precondition(state, gradient), gradient) < 1e-6


@EVERY
def test_a_first_gradient_of_zero(name: str) -> None:
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    step(block, state, torch.zeros(SHAPE))
    assert_healthy(block, state)


@EVERY
def test_rank_one_gradients(name: str) -> None:
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    gradient = torch.outer(torch.randn(6), torch.randn(4))
    for _ in range(5):
        update = step(block, state, gradient)
        assert torch.isfinite(update).all()
    assert (update * gradient).sum() > 0
    assert_healthy(block, state)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
@EVERY
def test_gradients_at_every_scale(name: str, scale: float) -> None:
    """None gives NaN or spoils what comes after; before, after and between ordinary ones."""
    for before in (0, 3):
        block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
        steps(block, state, count=before)
        for update in steps(block, state, scale, count=4):
            assert not torch.isnan(update).any()
        assert_healthy(block, state)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(("name", "tolerance"), [("kl_shampoo", 1e-3), ("muon", 0.05)])
def test_methods_that_know_no_scale_keep_their_updates(name: str, tolerance: float, scale: float) -> None:
    """Muon within bfloat16, which rounds each multiple of a gradient differently."""
    block = METHODS[name]
    expected, actual = (steps(block, fresh_state(block, SHAPE, torch.float32), c)[-1] for c in (1.0, scale))
    assert relative(actual, expected) < tolerance


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo"])
def test_a_gradient_that_dies_out(name: str) -> None:
    """Averages that decay through the denormal numbers: a run must not end on a layer that is not used any more."""
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    steps(block, state, count=3)
    for _ in range(900):  # 0.9**900 is 7e-42
        block.update(state, block.observe_gradient(state, torch.zeros(SHAPE)))
    for _ in range(3):
        block.refresh(state, DAMPING)
    assert_healthy(block, state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "muon"])
def test_a_refresh_that_fails_leaves_the_old_preconditioner(name: str, bad: float) -> None:
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    steps(block, state)
    for factor in [key for key in state if key.endswith(("L", "R"))]:
        good = state[factor].clone()
        state[factor][0, 0] = bad
        before = {key: state[key].clone() for key in block.refreshed}
        with pytest.raises(DecompositionError):
            block.refresh(state, DAMPING)
        assert all(torch.equal(state[key], value) for key, value in before.items())
        state[factor].copy_(good)
    assert_healthy(block, state)


@EVERY
def test_refresh_writes_what_it_says(name: str) -> None:
    """What other ranks are not sent must not change."""
    block, state = METHODS[name], fresh_state(METHODS[name], SHAPE, torch.float32)
    steps(block, state)
    block.update(state, block.observe_gradient(state, torch.randn(SHAPE)))
    before = {key: value.clone() for key, value in state.items()}
    block.refresh(state, DAMPING)
    changed = {key for key, value in state.items() if not torch.equal(value, before[key])}
    assert changed <= set(block.refreshed)
    assert name == "muon" or changed
