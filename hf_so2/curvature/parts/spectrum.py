"""Trace, damping ρ and condition number of damped factors, for a log. Each is 0-dim.

The condition number is `(λ_max + ρ) / (λ_min + ρ)`. A block-diagonal factor has the sum of its blocks' traces, their
mean ρ and their largest condition number.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_so2.linalg import block_diagonal, spectral_norm
from hf_so2.linalg import trace as matrix_trace

# Products cost the square of a factor's dimension, an eigendecomposition the cube. The error is at most 1 %.
ITERATIONS, DIRECTIONS = 8, 16


def of_roots(
    factors: Mapping[str, tuple[Tensor, Tensor]], roots: Mapping[str, Tensor], exponent: float
) -> dict[str, Tensor]:
    """The numbers of each side, from its factor, its ρ and its root.

    A root's largest eigenvalue is a power of the smallest eigenvalue of the damped factor at the last refresh.
    """
    found: dict[str, Tensor] = {}
    for side, (factor, rho) in factors.items():
        found |= {
            f"trace_{side}": trace(factor),
            f"damping_{side}": rho.mean(),
            f"condition_{side}": ((_norms(factor) + rho) * _norms(roots[side]) ** (1 / exponent)).clamp(min=1).max(),
        }
    return found


def trace(factor: Tensor) -> Tensor:
    """Trace of a factor in any form."""
    return factor.sum() if factor.ndim == 1 else matrix_trace(factor)


def norm(matrix: Tensor) -> Tensor:
    """The spectral norm, from a cold start. A vector stands for a diagonal matrix."""
    if matrix.ndim == 1:
        return matrix.abs().amax()
    start = matrix.new_zeros(matrix.shape[1], min(DIRECTIONS, *matrix.shape))
    return spectral_norm(matrix, start, ITERATIONS)[0]


def _norms(matrix: Tensor) -> Tensor:
    """The norm of a factor, 0-dim, or the norms of its blocks, (blocks,)."""
    return norm(matrix) if matrix.ndim == 1 else block_diagonal.measure(norm, matrix)


def quantity_of(name: str) -> str:
    """The name without its side."""
    return name.rstrip("ABLR").rstrip("_")
