"""Blocks: each is the method on its own piece of the matrix, and one block is no block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.shampoo_reference import feed, fresh_state, relative

from hf_so2.curvature.base import GradientBlock
from hf_so2.curvature.kl_shampoo import KLShampoo
from hf_so2.curvature.muon import Muon
from hf_so2.curvature.parts.blocked import Blocked
from hf_so2.curvature.shampoo import Shampoo
from hf_so2.curvature.soap import SOAP
from hf_so2.damping import Damping
from hf_so2.linalg import DecompositionError

METHODS: dict[str, Any] = {
    "shampoo": Shampoo(0.9),
    "shampoo_normalized": Shampoo(0.9, 0.5, normalized=True),
    "shampoo_left": Shampoo(0.9, sides=frozenset("L")),
    "soap": SOAP(0.9),
    "kl_shampoo": KLShampoo(0.9),
    "muon": Muon(),
}
EVERY = pytest.mark.parametrize("name", METHODS)
DAMPING = Damping("trace", 1e-3)


def updates(block: GradientBlock, gradients: np.ndarray) -> np.ndarray:
    """What becomes of each gradient at its own step, refreshing at every other one."""
    state = fresh_state(block, gradients[0].shape)
    result = []
    for step, gradient in enumerate(gradients):
        feed(block, state, gradient)
        if step % 2 == 0:
            block.refresh(state, DAMPING)
        result.append(block.precondition(state, torch.from_numpy(gradient)).numpy())
    return np.stack(result)


@EVERY
@pytest.mark.parametrize("size", [6, 1000])
def test_one_block_is_no_block(name: str, size: int) -> None:
    gradients = np.random.default_rng(0).normal(size=(5, 6, 4))
    np.testing.assert_array_equal(
        updates(Blocked(METHODS[name], size, (6, 4)), gradients), updates(METHODS[name], gradients)
    )


@EVERY
def test_blocks_are_independent(name: str) -> None:
    """7 x 4 in blocks of at most 3: rows 3 + 2 + 2, columns 2 + 2."""
    gradients = np.random.default_rng(0).normal(size=(5, 7, 4))
    actual = updates(Blocked(METHODS[name], 3, (7, 4)), gradients)
    for rows in (slice(0, 3), slice(3, 5), slice(5, 7)):
        for columns in (slice(0, 2), slice(2, 4)):
            np.testing.assert_array_equal(actual[:, rows, columns], updates(METHODS[name], gradients[:, rows, columns]))


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), size=st.integers(1, 45))
def test_no_block_is_too_large_and_none_a_small_leftover(shape: tuple[int, int], size: int) -> None:
    block = Blocked(Shampoo(0.9), size, shape)
    state = fresh_state(block, shape)
    for side, length in zip("LR", shape, strict=True):
        sizes = {len(value) for name, value in state.items() if name.endswith(f"/{side}")}
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        count = -(-length // size)
        assert max(sizes) == -(-length // count)
    assert set(block.refreshed) == {name for name in state if name.endswith("_root")}


@EVERY
def test_what_the_pipeline_asks_of_a_block_is_the_methods_answer(name: str) -> None:
    block = Blocked(METHODS[name], 3, (7, 4))
    assert block.building_steps == METHODS[name].building_steps
    assert block.corrects_momentum == METHODS[name].corrects_momentum
    assert not block.orthogonal  # a grid of orthogonal blocks is not
    assert isinstance(block, GradientBlock)
    state = fresh_state(block, (7, 4))
    assert state["weight"] == 0
    feed(block, state, np.ones((7, 4)))
    assert state["weight"] > 0


@pytest.mark.parametrize("name", ["shampoo", "kl_shampoo", "soap"])
def test_a_block_that_fails_leaves_all_of_them(name: str) -> None:
    block = Blocked(METHODS[name], 3, (6, 3))
    state = fresh_state(block, (6, 3))
    rng = np.random.default_rng(0)
    for _ in range(2):
        feed(block, state, rng.normal(size=(6, 3)))
        block.refresh(state, DAMPING)
    feed(block, state, rng.normal(size=(6, 3)))
    state["1.0/R"].fill_(torch.nan)
    before = {key: state[key].clone() for key in block.refreshed}
    with pytest.raises(DecompositionError):
        block.refresh(state, DAMPING)
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_damping_is_each_blocks_own() -> None:
    """A block of gradients a thousand times larger changes nothing for its neighbour."""
    gradients = np.random.default_rng(0).normal(size=(3, 4, 2))
    louder = gradients.copy()
    louder[:, 2:] *= 1e3
    quiet, loud = (updates(Blocked(Shampoo(0.9, 0.5), 2, (4, 2)), g) for g in (gradients, louder))
    np.testing.assert_array_equal(quiet[:, :2], loud[:, :2])
    assert relative(loud[:, 2:], quiet[:, 2:] / 1e3) < 1e-9
