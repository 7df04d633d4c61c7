"""`moment_token_stride`: EKFAC's second moments from every k-th row, and the factors from all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.dense_fisher import linear_layers, mlp_case, relative
from shared.helpers import token_loss_sum
from torch import Tensor

import hf_so2
from hf_so2.curvature import EKFAC, TEKFAC, State

METHODS = pytest.mark.parametrize("block", [EKFAC, TEKFAC])
Block = Callable[..., EKFAC]


def case(rows: int, seed: int = 0) -> tuple[State, Tensor, Tensor]:
    """A state with random orthonormal bases, and rows of inputs and gradients."""
    generator = torch.Generator().manual_seed(seed)
    state = EKFAC(0.9).init_state((3, 4), torch.device("cpu"), torch.float64)
    state["tau"] = torch.zeros((), dtype=torch.float64)
    for side, size in (("A", 4), ("B", 3)):
        state[f"{side}_basis"] = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    h, delta = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (4, 3))
    return state, h, delta


def moments(state: State, h: Tensor, delta: Tensor) -> np.ndarray:
    """`Σ (U_Bᵀ δ)_i² (U_Aᵀ h)_j²`, from the gradients `δ hᵀ` of single rows."""
    single = np.einsum("ni,nj->nij", delta.numpy(), h.numpy())
    rotated = np.einsum("ip,nij,jq->npq", state["B_basis"].numpy(), single, state["A_basis"].numpy())
    return (rotated**2).sum(axis=0)


@METHODS
@given(rows=st.integers(1, 40), stride=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_the_rows_that_take_turns_stand_for_all(block: Block, rows: int, stride: int, seed: int) -> None:
    state, h, delta = case(rows, seed)
    picked = [group * stride + group % stride for group in range(rows // stride)] or list(range(rows))
    seen = block(0.9, moment_stride=stride).observe(state, h, delta)
    expected = moments(state, h[picked], delta[picked]) * rows / len(picked)
    assert relative(seen["S"].numpy(), expected) < 1e-12
    of_all = block(0.9).observe(state, h, delta)
    assert all(torch.equal(seen[name], of_all[name]) for name in of_all if name != "S")


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_the_mean_over_all_orders_of_the_rows_is_that_of_all_rows(stride: int) -> None:
    """Every row is as likely as every other: its place decides, and in a circle of orders it is in every place once."""
    state, h, delta = case(23)
    block = EKFAC(0.9, moment_stride=stride)
    turned = [block.observe(state, h.roll(shift, 0), delta.roll(shift, 0))["S"].numpy() for shift in range(len(h))]
    assert relative(np.mean(turned, axis=0), moments(state, h, delta)) < 1e-12


def second_moments_at(stride: int, parts: list[slice]) -> dict[str, np.ndarray]:
    """After two steps, of which the first has given the bases."""
    model, _ = mlp_case()
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(48, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (48,), generator=generator)
    optimizer = hf_so2.build_optimizer(
        "ekfac", model, lr=1e-30, fallback_learning_rate=1e-30, moment_token_stride=stride
    )
    for _ in range(2):
        for part in parts:
            (token_loss_sum(model(inputs[part]), targets[part]) / 48).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.curvature is not None
    return {name: layer.state["S"].numpy() for name, layer in optimizer.curvature.layers.items()}


def test_batches_of_whole_turns_can_be_split() -> None:
    """A turn is 4² = 16 rows long."""
    whole, split = second_moments_at(4, [slice(None)]), second_moments_at(4, [slice(0, 32), slice(32, 48)])
    assert whole.keys() == set(linear_layers(mlp_case()[0]))
    for name in whole:
        assert relative(split[name], whole[name]) < 1e-10
        assert relative(whole[name], second_moments_at(1, [slice(None)])[name]) > 1e-3
