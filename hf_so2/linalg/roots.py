"""Inverses and roots of damped positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.linalg.eigen import eigh, is_finite
from hf_so2.linalg.errors import DecompositionError
from hf_so2.linalg.products import per_matrix

# LAPACK reads memory across rows. If the length of a row is a multiple of this many bytes, the entries of a column
# share the same few cache lines. From `LEAST` dimensions on, additional columns cost less than this.
ALIASED_BYTES, EXTRA, LEAST = 1024, 16, 1024


def damped_inverse(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """`(X + ρI)^-1` by Cholesky. Retried in float64 if the working precision is not sufficient.

    A symmetric inverse costs n³ flops in this way, about a quarter of an eigendecomposition.

    Args:
        matrix: symmetric positive semi-definite, shape (..., n, n), float32 or float64.
        damping: ρ > 0, a float or a tensor of shape (...,).

    Returns:
        The inverse, shape and dtype of `matrix`, exactly symmetric.

    Raises:
        DecompositionError: `X + ρI` is not positive definite in float64 either, or is not finite, or its inverse is not
            finite in the dtype of `matrix`.
    """
    inverse = _cholesky_inverse(matrix, damping)
    if inverse is None:
        retried = _cholesky_inverse(matrix.double(), damping)
        inverse = None if retried is None else retried.to(matrix.dtype)
        if inverse is None or not bool(torch.isfinite(inverse).all()):
            raise DecompositionError(f"a {tuple(matrix.shape)} factor is not positive definite after damping")
    return inverse


def damped_root(matrix: Tensor, damping: Tensor | float, exponent: float) -> Tensor:
    """`(X + ρI)^-e`, by Cholesky for e = 1 and by eigendecomposition otherwise.

    Args:
        matrix: symmetric positive semi-definite, shape (..., n, n), float32 or float64.
        damping: ρ > 0, a float or a tensor of shape (...,).
        exponent: e > 0.

    Returns:
        The root, shape and dtype of `matrix`, symmetric.

    Raises:
        DecompositionError: the damped matrix is not positive definite, or not finite, in float64 either, or its root is
            not finite in the dtype of `matrix`.
    """
    if exponent == 1:
        return damped_inverse(matrix, damping)
    values, vectors = eigh(matrix)
    powers = (values + (per_matrix(damping, values) if isinstance(damping, Tensor) else damping)).pow(-exponent)
    root = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    if not is_finite(root):
        raise DecompositionError(f"a {tuple(matrix.shape)} factor has no finite power -{exponent} after damping")
    return root


def _cholesky_inverse(matrix: Tensor, damping: Tensor | float) -> Tensor | None:
    size = matrix.shape[-1]
    damped = _unaliased(matrix)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)[..., :size]
    diagonal.add_(damping.to(matrix.dtype).unsqueeze(-1) if isinstance(damping, Tensor) else damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    # On some back ends, a NaN passes LAPACK's pivot test. The sum is not finite if an entry is not, and is much cheaper
    # to check. If the sum itself overflows, the retry in float64 decides.
    if not bool((info == 0).all() & torch.isfinite(factor.sum())):
        return None
    inverse = torch.cholesky_inverse(factor)[..., :size, :size]
    if inverse.device.type != "cpu":  # LAPACK mirrors one triangle, cuSOLVER computes both
        inverse = (inverse + inverse.mT) / 2
    # The inverse of denormal numbers overflows.
    return inverse if bool(torch.isfinite(inverse.sum())) else None


def _unaliased(matrix: Tensor) -> Tensor:
    """A copy. On a CPU it is the first block of `diag(X, I)`, if the length of X's rows makes column access slow."""
    size = matrix.shape[-1]
    if matrix.device.type != "cpu" or size < LEAST or size * matrix.itemsize % ALIASED_BYTES:
        return matrix.clone()
    padded = torch.nn.functional.pad(matrix, (0, EXTRA, 0, EXTRA))
    padded.diagonal(dim1=-2, dim2=-1)[..., size:] = 1
    return padded
