"""SOAP and KL-Shampoo in NumPy float64, from the papers, in the order statistics, refresh, precondition.

SOAP: arXiv 2409.11321, algorithms 3 and 4. KL-Shampoo: arXiv 2509.03378. The dense second moment, not the arithmetic of
the code under test, says what becomes of V when the basis moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hf_so2.curvature.base import GradientBlock, State


def fresh_state(block: GradientBlock, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> State:
    return block.init_state(shape, torch.device("cpu"), dtype)


def feed(block: GradientBlock, state: State, gradient: np.ndarray | Tensor) -> None:
    """One update of the statistics."""
    gradient = torch.as_tensor(gradient, dtype=state["weight"].dtype)
    block.update(state, block.observe_gradient(state, gradient))


def relative(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Of the difference, in Frobenius norm."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def inverse_power(matrix: np.ndarray, p: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**-p) @ vectors.T


@dataclass
class KLShampooReference:
    """One matrix; damping is `epsilon` times the trace."""

    beta: float
    epsilon: float
    factors: list[np.ndarray] | None = None
    damped: list[np.ndarray] | None = None
    steps: int = 0

    def update(self, g: np.ndarray) -> None:
        m, n = g.shape
        if self.damped is None:
            scale = np.sqrt(np.mean(g**2))
            inverse_l, inverse_r = np.eye(m) / scale, np.eye(n) / scale
        else:
            inverse_l, inverse_r = (np.linalg.inv(factor) for factor in self.damped)
        new = [g @ inverse_r @ g.T / n, g.T @ inverse_l @ g / m]
        old = self.factors or [np.zeros((m, m)), np.zeros((n, n))]
        self.factors = [self.beta * x + (1 - self.beta) * y for x, y in zip(old, new, strict=True)]
        self.steps += 1

    def refresh(self) -> None:
        assert self.factors is not None
        corrected = [factor / (1 - self.beta**self.steps) for factor in self.factors]
        self.damped = [x + self.epsilon * np.trace(x) * np.eye(len(x)) for x in corrected]

    def precondition(self, g: np.ndarray) -> np.ndarray:
        assert self.damped is not None
        left, right = (inverse_power(factor, 0.5) for factor in self.damped)
        return left @ g @ right


@dataclass
class SOAPReference:
    """One matrix. A basis with a null space is decomposed anew each time, and V averaged over the null space."""

    beta: float
    eps: float
    full_every: int
    factors: list[np.ndarray] = field(default_factory=list)
    bases: list[np.ndarray] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    v: np.ndarray | None = None
    steps: int = 0
    v_steps: int = 0
    refreshes: int = 0

    def update(self, g: np.ndarray) -> None:
        if self.bases:
            left, right = self.bases
            observed = self.over_null_spaces((left.T @ g @ right) ** 2)
            self.v = (1 - self.beta) * observed + (self.beta * self.v if self.v is not None else 0)
            self.v_steps += 1
        old = self.factors or [np.zeros((size, size)) for size in g.shape]
        self.factors = [self.beta * x + (1 - self.beta) * y for x, y in zip(old, (g @ g.T, g.T @ g), strict=True)]
        self.steps += 1

    def refresh(self) -> None:
        corrected = [factor / (1 - self.beta**self.steps) for factor in self.factors]
        if self.refreshes % self.full_every == 0:
            bases = [np.linalg.eigh(factor)[1] for factor in corrected]
        else:
            bases = [self.followed(i, factor) for i, factor in enumerate(corrected)]
        old, self.bases = self.bases, bases
        # A power step neither fills nor empties a null space.
        self.ranks = [int(np.linalg.matrix_rank(factor, hermitian=True)) for factor in corrected]
        if self.v is not None:
            old_vectors, new_vectors = np.kron(*old), np.kron(*bases)
            dense = (old_vectors * self.v.ravel()) @ old_vectors.T
            diagonal = np.sum(new_vectors * (dense @ new_vectors), axis=0)
            self.v = self.over_null_spaces(diagonal.reshape(self.v.shape))
        self.refreshes += 1

    def followed(self, side: int, factor: np.ndarray) -> np.ndarray:
        if self.ranks[side] < len(factor):
            return np.linalg.eigh(factor)[1]
        basis = self.bases[side]
        order = np.argsort(-np.diag(basis.T @ factor @ basis))
        return np.linalg.qr(factor @ basis[:, order])[0]

    def over_null_spaces(self, v: np.ndarray) -> np.ndarray:
        """Ascending eigenvalues: the null space comes first."""
        for axis, rank in enumerate(self.ranks):
            empty = v.shape[axis] - rank
            moved = np.moveaxis(v, axis, 0).copy()
            moved[:empty] = moved[:empty].mean(axis=0) if empty else 0
            v = np.moveaxis(moved, 0, axis)
        return v

    def precondition(self, g: np.ndarray) -> np.ndarray:
        assert self.v is not None
        left, right = self.bases
        v = self.v / (1 - self.beta**self.v_steps)
        return left @ (left.T @ g @ right / (np.sqrt(v) + self.eps)) @ right.T
