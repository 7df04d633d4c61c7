"""Eigendecompositions of positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.linalg.errors import DecompositionError


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, `X = U diag(λ) Uᵀ`, retried in float64 where the working precision fails.

    Args:
        matrix: symmetric positive semi-definite, shape (..., n, n), float32 or float64.

    Returns:
        λ of shape (..., n), ascending, with negative round-off set to zero, and U of shape (..., n, n).

    Raises:
        DecompositionError: the matrix is not finite, or the iteration does not converge in float64 either.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise DecompositionError(f"a {tuple(matrix.shape)} factor is not finite")
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        try:
            values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(matrix.double()))
        except torch.linalg.LinAlgError as error:
            raise DecompositionError(f"a {tuple(matrix.shape)} factor has no eigendecomposition: {error}") from error
    return values.clamp(min=0), vectors
