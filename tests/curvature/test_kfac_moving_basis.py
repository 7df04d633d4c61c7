"""Running averages and moving eigenbases: every method against a plain NumPy account of it, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.dense_fisher import METHODS, relative
from shared.kfac_reference import BLOCKS, Reference, feed, fresh_state, random_rows

from hf_so2.damping import Damping

EPSILON = 1e-3
SEEDS = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "constant"])
@pytest.mark.parametrize("name", METHODS)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    beta=st.sampled_from([0.0, 0.5, 0.95]),
    refreshes=st.sets(st.integers(2, 6)),
)
@settings(max_examples=8)
def test_many_steps_equal_numpy(
    name: str, rule: str, seed: int, shape: tuple[int, int], beta: float, refreshes: set[int]
) -> None:
    """Averages, seed, S's own average, and bases that move at any of the steps."""
    rng = np.random.default_rng(seed)
    block, reference = BLOCKS[name](beta), Reference(name, beta)
    state = fresh_state(block, shape)
    rho_s = None
    for step in range(1, 7):
        rows, gradient = random_rows(rng, 30, shape), rng.normal(size=shape)
        feed(block, state, rows)
        reference.update(rows)
        if step in refreshes | {1}:
            block.refresh(state, Damping(rule, EPSILON))
            reference.refresh()
            rho_s = None if reference.s is None else expected_rho(rule, reference.s)
        actual = block.precondition(state, torch.from_numpy(gradient))
        assert relative(actual, reference.precondition(gradient, rule, EPSILON, rho_s)) < 1e-8, step


def expected_rho(rule: str, s: np.ndarray) -> float:
    return EPSILON * {"trace": s.sum(), "trace_mean": s.mean(), "spectral": s.max(), "constant": 1.0}[rule]


def dense(state: dict[str, torch.Tensor]) -> np.ndarray:
    basis = np.kron(state["B_basis"].numpy(), state["A_basis"].numpy())
    return basis @ np.diag(state["S"].numpy().ravel()) @ basis.T


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
def test_the_first_basis_seeds_s_with_the_kronecker_product(name: str) -> None:
    rng = np.random.default_rng(0)
    block = BLOCKS[name](0.9)
    state, rows = fresh_state(block, (4, 5)), random_rows(rng, 40, (4, 5))
    feed(block, state, rows)
    assert not state["S"].any()
    block.refresh(state, Damping("trace", EPSILON))
    h, delta = rows
    if name == "ekfac":
        expected = np.kron(delta.T @ delta / 40, h.T @ h / 40)
    else:
        sizes_h, sizes_delta = np.sum(h**2, axis=1), np.sum(delta**2, axis=1)
        phi = np.einsum("t,ti,tj->ij", sizes_delta, h, h) / 40
        psi = np.einsum("t,ti,tj->ij", sizes_h, delta, delta) / 40
        expected = np.kron(psi, phi) / np.mean(sizes_h * sizes_delta)
    assert relative(dense(state), expected) < 1e-12


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=30)
def test_a_moved_basis_takes_s_along(name: str, seed: int, shape: tuple[int, int]) -> None:
    """S becomes the diagonal of the old approximation in the new basis, trace and all; its average goes on from it."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[name](0.5)
    state = fresh_state(block, shape)
    feed(block, state, random_rows(rng, 20, shape))
    block.refresh(state, Damping("trace", EPSILON))
    feed(block, state, random_rows(rng, 20, shape))
    before, trace = dense(state), float(state["S"].sum())
    block.refresh(state, Damping("trace", EPSILON))
    basis = np.kron(state["B_basis"].numpy(), state["A_basis"].numpy())
    assert relative(state["S"].numpy().ravel(), (basis.T @ before @ basis).diagonal()) < 1e-12
    assert abs(float(state["S"].sum()) / trace - 1) < 1e-12
    assert abs(float(state["rho"]) / (EPSILON * trace) - 1) < 1e-12


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
def test_a_basis_that_stays_leaves_s_as_it_is(name: str) -> None:
    rng = np.random.default_rng(0)
    block = BLOCKS[name](0.5)
    state, rows = fresh_state(block, (4, 5)), random_rows(rng, 20, (4, 5))
    for _ in range(2):
        feed(block, state, rows)
        block.refresh(state, Damping("trace", EPSILON))
    before = state["S"].clone()
    block.refresh(state, Damping("trace", EPSILON))
    assert relative(state["S"], before) < 1e-13
