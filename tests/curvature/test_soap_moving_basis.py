"""SOAP's update is a function of the gradients: not of the order, the signs or the choice of basis vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.shampoo_reference import feed, fresh_state, relative

from hf_so2.curvature.base import State
from hf_so2.curvature.soap import SOAP
from hf_so2.damping import Damping

SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))
UNUSED = Damping("trace", 1e-3)


def run(block: SOAP, state: State, gradients: np.ndarray, refreshes: set[int]) -> None:
    for step, gradient in enumerate(gradients):
        feed(block, state, gradient)
        if step in refreshes:
            block.refresh(state, UNUSED)


def shuffle(state: State, rng: np.random.Generator) -> None:
    """Put the basis vectors of both sides in another order, some with another sign, and all that belongs to them."""
    for side, axis in (("L", 0), ("R", 1)):
        size = len(state[side])
        order = torch.from_numpy(rng.permutation(size))
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=size))
        state[f"{side}_basis"] = state[f"{side}_basis"][:, order] * signs
        state[f"{side}_values"] = state[f"{side}_values"][order]
        state["V"] = state["V"].index_select(axis, order)


@given(seed=SEEDS, shape=SHAPES, rank=st.integers(1, 7), full_every=st.sampled_from([1, 2, 100]))
@settings(max_examples=30)
def test_permuted_and_flipped_vectors_never_change_an_update(
    seed: int, shape: tuple[int, int], rank: int, full_every: int
) -> None:
    """Not the next one, and none after the basis has moved on, by a power step or a decomposition."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(8, shape[0], rank)), rng.normal(size=(8, rank, shape[1]))
    gradients = factors[0] @ factors[1]
    block = SOAP(0.9, full_every=full_every)
    state = fresh_state(block, shape)
    run(block, state, gradients[:4], {0, 2})
    other = {name: value.clone() for name, value in state.items()}
    moment = torch.from_numpy(rng.normal(size=shape))
    shuffle(other, rng)
    assert relative(block.precondition(other, moment), block.precondition(state, moment)) < 1e-10
    for twin in (state, other):
        run(block, twin, gradients[4:], {1, 2})
    assert relative(block.precondition(other, moment), block.precondition(state, moment)) < 1e-7


def rotate_null_space(state: State, side: str, rng: np.random.Generator) -> None:
    """Another basis of the eigenspace of eigenvalue zero."""
    values, basis = state[f"{side}_values"], state[f"{side}_basis"]
    empty = values < 1e-10 * values.max()
    size = int(empty.sum())
    if size:
        rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(size, size)))[0])
        basis[:, empty] = basis[:, empty] @ rotation


@given(seed=SEEDS, shape=SHAPES, full_every=st.sampled_from([1, 100]))
@settings(max_examples=30)
def test_the_choice_of_vectors_in_a_null_space_never_changes_an_update(
    seed: int, shape: tuple[int, int], full_every: int
) -> None:
    """What a decomposition returns there is round-off: another split of a batch would give another update."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(7, *shape))
    gradients[0] = np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))
    block = SOAP(0.9, full_every=full_every)
    state = fresh_state(block, shape)
    run(block, state, gradients[:1], {0})
    other = {name: value.clone() for name, value in state.items()}
    for side in "LR":
        rotate_null_space(other, side, rng)
    moment = torch.from_numpy(rng.normal(size=shape))
    for start, stop in ((1, 3), (3, 5), (5, 7)):
        for twin in (state, other):
            run(block, twin, gradients[start:stop], {1})
        assert relative(block.precondition(other, moment), block.precondition(state, moment)) < 1e-7


def test_gradients_without_a_preferred_direction() -> None:
    """c I has every basis for an eigenbasis: V is c²/n in all of them, and the update the moment's own direction."""
    n, c = 5, 0.3
    block = SOAP(0.9, eps=0.0)
    state = fresh_state(block, (n, n))
    run(block, state, np.stack([c * np.eye(n)] * 4), {0, 1, 2})
    moment = torch.from_numpy(np.random.default_rng(0).normal(size=(n, n)))
    assert relative(block.precondition(state, moment), moment * np.sqrt(n) / c) < 1e-12


def dense(state: State) -> np.ndarray:
    basis = np.kron(state["L_basis"].numpy(), state["R_basis"].numpy())
    return basis @ np.diag(state["V"].numpy().ravel()) @ basis.T


@pytest.mark.parametrize("full_every", [1, 100])
@given(seed=SEEDS)
@settings(max_examples=10)
def test_a_moved_basis_takes_v_along(full_every: int, seed: int) -> None:
    """V becomes the diagonal of the old second moment in the new basis, trace and all."""
    rng = np.random.default_rng(seed)
    block = SOAP(0.5, full_every=full_every)
    state = fresh_state(block, (3, 4))
    run(block, state, rng.normal(size=(6, 3, 4)), {1, 3})
    before, trace, old = dense(state), float(state["V"].sum()), state["L_basis"].clone()
    block.refresh(state, UNUSED)
    assert not torch.equal(state["L_basis"], old)
    basis = np.kron(state["L_basis"].numpy(), state["R_basis"].numpy())
    assert relative(state["V"].ravel(), (basis.T @ before @ basis).diagonal()) < 1e-10
    assert abs(float(state["V"].sum()) / trace - 1) < 1e-12


def is_eigenbasis(state: State, side: str) -> bool:
    rotated = (state[f"{side}_basis"].mT @ state[side] @ state[f"{side}_basis"]).numpy()
    return bool(np.linalg.norm(rotated - np.diag(np.diag(rotated))) < 1e-10 * np.linalg.norm(rotated))


def test_power_steps_between_full_decompositions() -> None:
    """The first and every third refresh decompose; so does one whose last basis had a null space."""
    rng = np.random.default_rng(0)
    block = SOAP(0.9, full_every=3)
    state = fresh_state(block, (3, 3))
    run(block, state, rng.normal(size=(5, 3, 3)), set())
    exact = []
    for _ in range(7):
        feed(block, state, rng.normal(size=(3, 3)))
        block.refresh(state, UNUSED)
        exact.append(is_eigenbasis(state, "L"))
    assert exact == [True, False, False, True, False, False, True]
    singular = fresh_state(block, (4, 2))
    run(block, singular, rng.normal(size=(1, 4, 2)), {0})
    run(block, singular, rng.normal(size=(1, 4, 2)), {0})
    assert is_eigenbasis(singular, "L")
    assert not is_eigenbasis(singular, "R")


def test_a_basis_within_the_tolerance_stays() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 3, 3))
    for tolerance, stays in ((1.0, True), (1e-6, False)):
        block = SOAP(0.9, tolerance=tolerance)
        state = fresh_state(block, (3, 3))
        run(block, state, gradients, {0})
        before = state["L_basis"].clone()
        block.refresh(state, UNUSED)
        assert torch.equal(state["L_basis"], before) == stays


def test_nothing_moves_before_v_has_seen_a_gradient() -> None:
    block = SOAP(0.9)
    state = fresh_state(block, (3, 4))
    gradient = torch.randn(3, 4, dtype=torch.float64)
    feed(block, state, gradient)
    assert not state["V"].any()
    block.refresh(state, UNUSED)
    assert not block.precondition(state, gradient).any()
    assert (block.building_steps, block.corrects_momentum) == (1, True)


@pytest.mark.parametrize("side", ["L", "R"])
def test_one_side_rotates_that_side_only(side: str) -> None:
    """Rotating the gradients along the preconditioned side rotates the update; Adam's axes stay on the other."""
    rng = np.random.default_rng(0)
    gradients, moment = rng.normal(size=(5, 4, 4)), rng.normal(size=(4, 4))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]

    def update(turn: np.ndarray) -> np.ndarray:
        def turned(x: np.ndarray) -> np.ndarray:
            return turn @ x if side == "L" else x @ turn

        block = SOAP(0.9, sides=frozenset(side))
        state = fresh_state(block, (4, 4))
        run(block, state, turned(gradients), {0, 2, 3})
        return block.precondition(state, torch.from_numpy(turned(moment))).numpy()

    straight = update(np.eye(4))
    expected = rotation @ straight if side == "L" else straight @ rotation
    assert relative(update(rotation), expected) < 1e-10
