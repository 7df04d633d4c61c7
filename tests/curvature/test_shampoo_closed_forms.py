"""Shampoo's answers that can be written down, SOAP that is AdamW, and Muon that is torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.shampoo_reference import feed, fresh_state, inverse_power, relative
from torch import Tensor

from hf_so2.curvature.kl_shampoo import KLShampoo
from hf_so2.curvature.muon import Muon
from hf_so2.curvature.shampoo import Shampoo
from hf_so2.curvature.soap import SOAP
from hf_so2.damping import Damping
from hf_so2.errors import ConfigurationError

LEFT, RIGHT = frozenset("L"), frozenset("R")
ROOTS = pytest.mark.parametrize("root", ["eigen", "newton"])
POWERS = pytest.mark.parametrize(("exponent", "normalized"), [(0.25, False), (0.5, False), (0.5, True)])


def preconditioned(block: Any, gradients: list[np.ndarray], moment: np.ndarray, damping: Damping) -> Tensor:
    """`P(moment)` after these gradients and one refresh."""
    state = fresh_state(block, moment.shape)
    for gradient in gradients:
        feed(block, state, gradient)
    block.refresh(state, damping)
    return block.precondition(state, torch.from_numpy(moment))


def orthonormal(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, count)))[0]


@ROOTS
@POWERS
@pytest.mark.parametrize("accumulate", ["ema", "sum"])
def test_identity_gradients(exponent: float, normalized: bool, accumulate: str, root: str) -> None:
    """After k gradients c I: L = R = c² I, or k c² I as a sum."""
    n, k, c, epsilon = 5, 3, 0.3, 0.01
    block = Shampoo(0.9, exponent, normalized, accumulate, root=root)
    actual = preconditioned(block, [c * np.eye(n)] * k, np.eye(n), Damping("constant", epsilon))
    factor = c**2 * (k if accumulate == "sum" else 1)
    scale = np.sqrt(n * factor) if normalized else 1.0
    assert relative(actual, scale * (factor + epsilon) ** (-2 * exponent) * np.eye(n)) < 1e-10


@ROOTS
@POWERS
@pytest.mark.parametrize("accumulate", ["ema", "sum"])
def test_two_orthogonal_rank_one_gradients(exponent: float, normalized: bool, accumulate: str, root: str) -> None:
    """Each direction keeps its own weight in the average, and is divided by its own power of it."""
    rng = np.random.default_rng(0)
    u, v = orthonormal(rng, 6, 2), orthonormal(rng, 4, 2)
    a, b, beta, rho = 2.0, 0.5, 0.8, 1e-3
    gradients = [a * np.outer(u[:, 0], v[:, 0]), b * np.outer(u[:, 1], v[:, 1])]
    weights = np.array([1.0, 1.0] if accumulate == "sum" else [beta * (1 - beta), 1 - beta])
    if accumulate == "ema":
        weights /= 1 - beta**2
    moment = u @ np.diag([3.0, 7.0]) @ v.T
    block = Shampoo(beta, exponent, normalized, accumulate, root=root)
    actual = preconditioned(block, gradients, moment, Damping("constant", rho))
    values = weights * np.array([a, b]) ** 2
    scale = np.sqrt(values.sum()) if normalized else 1.0
    assert relative(actual, scale * u @ np.diag([3.0, 7.0] / (values + rho) ** (2 * exponent)) @ v.T) < 1e-9


@pytest.mark.parametrize("rule", ["trace", "spectral"])
@POWERS
def test_damping_that_vanishes_whitens_a_gradient(exponent: float, normalized: bool, rule: str) -> None:
    """`U Vᵀ` for p = ¼, `U Σ^-1 Vᵀ` for p = ½."""
    gradient = np.random.default_rng(0).normal(size=(5, 5))
    u, sigma, vt = np.linalg.svd(gradient)
    expected = (u * sigma ** (1 - 4 * exponent)) @ vt * (np.linalg.norm(gradient) if normalized else 1.0)
    actual = preconditioned(Shampoo(0.9, exponent, normalized), [gradient], gradient, Damping(rule, 1e-13))
    assert relative(actual, expected) < 1e-5


@POWERS
def test_damping_that_dominates_leaves_the_direction(exponent: float, normalized: bool) -> None:
    rng = np.random.default_rng(0)
    gradient, moment = rng.normal(size=(2, 4, 6))
    epsilon = 1e9
    actual = preconditioned(Shampoo(0.9, exponent, normalized), [gradient], moment, Damping("trace", epsilon))
    norm = np.linalg.norm(gradient)
    expected = moment * (epsilon * norm**2) ** (-2 * exponent) * (norm if normalized else 1.0)
    assert relative(actual, expected) < 1e-8


@pytest.mark.parametrize("sides", [LEFT, RIGHT], ids=["L", "R"])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
@pytest.mark.parametrize("name", ["shampoo", "kl_shampoo"])
def test_one_side_takes_the_square_root(name: str, exponent: float, sides: frozenset[str]) -> None:
    rng = np.random.default_rng(0)
    gradient, moment = rng.normal(size=(2, 4, 6))
    block = Shampoo(0.9, exponent, sides=sides) if name == "shampoo" else KLShampoo(0.9, sides)
    actual = preconditioned(block, [gradient], moment, Damping("constant", 1e-2))
    factor = gradient @ gradient.T if sides == LEFT else gradient.T @ gradient
    if name == "kl_shampoo":
        factor = factor / (6 if sides == LEFT else 4)
    root = inverse_power(factor + 1e-2 * np.eye(len(factor)), 0.5)
    assert relative(actual, root @ moment if sides == LEFT else moment @ root) < 1e-10
    assert not {"L", "R"} - sides & fresh_state(block, (4, 6)).keys()


@POWERS
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=20)
def test_only_one_half_depends_on_the_gradients_scale(
    exponent: float, normalized: bool, scale: float, seed: int
) -> None:
    gradient = np.random.default_rng(seed).normal(size=(4, 3))
    block, damping = Shampoo(0.9, exponent, normalized), Damping("trace", 1e-3)
    expected = preconditioned(block, [gradient], gradient, damping)
    actual = preconditioned(block, [scale * gradient], scale * gradient, damping)
    assert relative(actual, expected * (1 if exponent == 0.25 or normalized else 1 / scale)) < 1e-8


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=20)
def test_kl_shampoo_is_free_of_the_gradients_scale(scale: float, seed: int) -> None:
    """From the first step on, whatever the factors start from."""
    gradients = np.random.default_rng(seed).normal(size=(4, 4, 3))
    updates = []
    for c in (1.0, scale):
        block = KLShampoo(0.9)
        state = fresh_state(block, (4, 3))
        for gradient in gradients:
            feed(block, state, c * gradient)
            block.refresh(state, Damping("trace", 1e-3))
        updates.append(block.precondition(state, torch.from_numpy(c * gradients[0])))
    assert relative(updates[1], updates[0]) < 1e-8


@pytest.mark.parametrize(
    ("setting", "value", "rest"),
    [
        ("exponent", 0.3, {}),
        ("normalized", True, {"exponent": 0.25}),
        ("accumulate", "mean", {}),
        ("root", "svd", {}),
    ],
)
def test_illegal_settings_are_refused(setting: str, value: Any, rest: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Shampoo(0.9, **{setting: value}, **rest)
    assert refusal.value.field == setting


def identity_basis(block: SOAP, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The state after a refresh that happened to find the axes."""
    state = fresh_state(block, shape)
    state["refreshes"].fill_(1)
    for side in block.sides:
        state[f"{side}_basis"].copy_(torch.eye(len(state[side])))
        state[f"{side}_values"].copy_(torch.arange(1, len(state[side]) + 1))
    return state


@pytest.mark.parametrize("sides", ["", "L", "R", "LR"])
@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_soap_in_the_identity_basis_is_adamw(sides: str, beta2: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64)
    parameter = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, beta2), eps=1e-3, weight_decay=0.1)
    block = SOAP(beta2, eps=1e-3, sides=frozenset(sides))
    state, moment = identity_basis(block, (5, 4)), torch.zeros_like(weight)
    for step in range(1, 11):
        gradient = torch.randn_like(weight)
        parameter.grad = gradient.clone()
        adamw.step()
        feed(block, state, gradient)
        moment = moment.lerp(gradient, 0.1)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * block.precondition(state, moment / (1 - 0.9**step))
        assert relative(weight, parameter.detach()) < 1e-14


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 7)], ids=str)
def test_muon_is_torchs(shape: tuple[int, int], nesterov: bool) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    weight = parameter.detach().clone()
    muon = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    block, moment = Muon(), torch.zeros(shape)
    state = fresh_state(block, shape, torch.float32)
    for _ in range(5):
        gradient = torch.randn(shape)
        parameter.grad = gradient.clone()
        muon.step()
        feed(block, state, gradient)
        moment.lerp_(gradient, 0.1)
        update = block.precondition(state, gradient.lerp(moment, 0.9) if nesterov else moment)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * update
        assert relative(weight, parameter.detach()) < 1e-6


@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    exponent=st.sampled_from([-100, -40, 0, 40, 100]),
)
def test_muon_does_not_depend_on_the_scale(seed: int, shape: tuple[int, int], exponent: int) -> None:
    """Not by a bit, for powers of two; the spectral norm is about one at any scale."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    block = Muon()
    update = block.precondition({}, gradient)
    assert torch.equal(block.precondition({}, gradient * 2.0**exponent), update)
    assert 0.5 < torch.linalg.matrix_norm(update, 2) < 1.5
