"""Trace, damping ρ and condition number of damped factors, for a log: each 0-dim.

The condition number is `(λ_max + ρ) / (λ_min + ρ)`. Of a block-diagonal factor traces add up, of ρ the mean is told and
of condition numbers the largest.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_so2.linalg import block_diagonal, spectral_norm
from hf_so2.linalg import trace as matrix_trace

# The cost of these products grows with the square of a factor, of an eigendecomposition with the cube; 1 % off at most.
ITERATIONS, DIRECTIONS = 8, 16


def of_roots(
    factors: Mapping[str, tuple[Tensor, Tensor]], roots: Mapping[str, Tensor], exponent: float
) -> dict[str, Tensor]:
    """Of factors and their ρ by side; the roots' largest eigenvalues are that power of the smallest at the refresh."""
    found: dict[str, Tensor] = {}
    for side, (factor, rho) in factors.items():
        found |= {
            f"trace_{side}": trace(factor),
            f"damping_{side}": rho.mean(),
            f"condition_{side}": ((_norms(factor) + rho) * _norms(roots[side]) ** (1 / exponent)).clamp(min=1).max(),
        }
    return found


def trace(factor: Tensor) -> Tensor:
    """Of a factor in any form."""
    return factor.sum() if factor.ndim == 1 else matrix_trace(factor)


def norm(matrix: Tensor) -> Tensor:
    """The spectral norm, from a cold start; a vector is a diagonal."""
    if matrix.ndim == 1:
        return matrix.abs().amax()
    start = matrix.new_zeros(matrix.shape[1], min(DIRECTIONS, *matrix.shape))
    return spectral_norm(matrix, start, ITERATIONS)[0]


def _norms(matrix: Tensor) -> Tensor:
    """The norm of a factor, 0-dim, or those of its blocks, (blocks,)."""
    return norm(matrix) if matrix.ndim == 1 else block_diagonal.measure(norm, matrix)


def quantity_of(name: str) -> str:
    """A name without the side that it is of."""
    return name.rstrip("ABLR").rstrip("_")
