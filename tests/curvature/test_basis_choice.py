"""What a decomposition leaves open (signs, order, bases of eigenspaces) must not reach an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.dense_fisher import relative
from shared.kfac_reference import BLOCKS, Rows, feed, fresh_state, random_rows
from torch import Tensor

import hf_so2.curvature.ekfac
import hf_so2.linalg.roots
from hf_so2.curvature import KFAC
from hf_so2.damping import Damping

SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6))
EVERY = {**BLOCKS, "square root": lambda beta: KFAC(beta, 0.5, 0.5)}
Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]


def another_choice(eigh: Eigh, rng: np.random.Generator, *, order: bool) -> Eigh:
    """Another decomposition of the same matrix: random signs, rotations within eigenspaces, and order."""

    def chosen(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        size = len(values)
        gaps = np.diff(values.numpy()) > 1e-12 * float(values[-1])
        rotation = np.zeros((size, size))
        starts = [0, *(np.flatnonzero(gaps) + 1), size]
        for start, end in pairwise(starts):
            rotation[start:end, start:end] = np.linalg.qr(rng.normal(size=(end - start, end - start)))[0]
        rotation = rotation * rng.choice([-1.0, 1.0], size=size)
        permutation = rng.permutation(size) if order else np.arange(size)
        vectors = vectors @ torch.from_numpy(rotation).to(vectors.dtype)
        return values[permutation], vectors[:, permutation]

    return chosen


@contextmanager
def other_choices(rng: np.random.Generator, *, order: bool = True) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (hf_so2.curvature.ekfac, hf_so2.linalg.roots):
            patch.setattr(module, "eigh", another_choice(module.eigh, rng, order=order))
        yield


def updates(name: str, batches: list[Rows], gradients: list[np.ndarray]) -> list[Tensor]:
    """`P(G)` after every batch, refreshed after every batch but the third."""
    block = EVERY[name](0.7)
    state = fresh_state(block, gradients[0].shape)
    result = []
    for step, (rows, gradient) in enumerate(zip(batches, gradients, strict=True)):
        feed(block, state, rows)
        if step != 2:
            block.refresh(state, Damping("trace", 1e-3))
        result.append(block.precondition(state, torch.from_numpy(gradient)))
    return result


def isotropic_rows(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Independent `h` and `δ` whose second moments are multiples of the identity, exactly."""
    bases = [np.linalg.qr(rng.normal(size=(size, size)))[0] * np.sqrt(size) * rng.uniform(0.5, 2) for size in shape]
    delta, h = bases
    return np.repeat(h, len(delta), axis=0), np.tile(delta, (len(h), 1))


def repeated_rows(rng: np.random.Generator, shape: tuple[int, int], basis: tuple[np.ndarray, np.ndarray]) -> Rows:
    """Independent `h` and `δ`; the eigenvalues of both moments come in pairs, in a basis common to all batches."""
    delta, h = (
        np.diag(np.sqrt(size * np.repeat(rng.uniform(0.1, 2, size), 2)[:size])) @ directions
        for size, directions in zip(shape, basis, strict=True)
    )
    return np.repeat(h, len(delta), axis=0), np.tile(delta, (len(h), 1))


def agree(name: str, batches: list[Rows], shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=shape) for _ in batches]
    plain = updates(name, batches, gradients)
    with other_choices(rng):
        others = updates(name, batches, gradients)
    for step, (first, second) in enumerate(zip(plain, others, strict=True)):
        assert relative(second, first) < 1e-8, step


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS, shape=SHAPES)
@settings(max_examples=25)
def test_signs_and_order_of_eigenvectors(name: str, seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    agree(name, [random_rows(rng, 20, shape) for _ in range(4)], shape, seed)


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS, shape=SHAPES)
@settings(max_examples=25)
def test_identity_factors(name: str, seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    agree(name, [isotropic_rows(rng, shape) for _ in range(4)], shape, seed)


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS, shape=SHAPES)
@settings(max_examples=25)
def test_repeated_eigenvalues(name: str, seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    basis = tuple(np.linalg.qr(rng.normal(size=(size, size)))[0] for size in shape)
    agree(name, [repeated_rows(rng, shape, basis) for _ in range(4)], shape, seed)


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS, shape=st.tuples(st.integers(3, 8), st.integers(3, 8)), count=st.integers(1, 4))
@settings(max_examples=25)
def test_null_spaces_that_later_batches_fill(name: str, seed: int, shape: tuple[int, int], count: int) -> None:
    """Fewer rows than dimensions: the second batch has components where the first basis was anybody's choice."""
    rng = np.random.default_rng(seed)
    agree(name, [random_rows(rng, count, shape) for _ in range(4)], shape, seed)


@pytest.mark.parametrize("name", EVERY)
@given(seed=SEEDS)
@settings(max_examples=25)
def test_isotropic_factors_of_dependent_rows(name: str, seed: int) -> None:
    """`E[h hᵀ]` and `E[δ δᵀ]` are multiples of the identity, yet `h` and `δ` depend on each other."""
    rng = np.random.default_rng(seed)
    size = 4
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    batches = [(np.sqrt(size) * basis, np.sqrt(size) * basis[rng.permutation(size)]) for _ in range(4)]
    agree(name, batches, (size, size), seed)
