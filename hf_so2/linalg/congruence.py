"""Diagonalizes two symmetric matrices simultaneously."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.linalg.eigen import eigh
from hf_so2.linalg.errors import DecompositionError


def common_basis(part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """`T` with `Tᵀ Y T = I` and `Tᵀ X T = diag(μ)`, for `0 ≤ X ≤ Y`. Retried in float64 if the precision fails.

    The Cholesky factor of `Y` whitens `X`. The eigenvectors of the whitened `X` give `T` (Golub & Van Loan, Matrix
    Computations, 4th edition, algorithm 8.7.1). `T` is a basis, but not an orthonormal one. Its signs and its order are
    arbitrary, and so are its columns in the space of a repeated μ. `T f(μ) Tᵀ` is not arbitrary.

    Args:
        part: X, symmetric positive semi-definite, shape (n, n), float32 or float64.
        whole: Y, symmetric positive definite, with `Y - X` positive semi-definite.

    Returns:
        T of shape (n, n) and μ of shape (n,), ascending, in [0, 1], in the dtype of the matrices.

    Raises:
        DecompositionError: Y is not positive definite in float64 either, or T is not finite.
    """
    found = _common_basis(part, whole)
    if found is None:
        found = _common_basis(part.double(), whole.double())
    if found is None or not bool(torch.isfinite((basis := found[0].to(whole.dtype)).sum())):
        raise DecompositionError(f"a {tuple(whole.shape)} sum of two factors is not positive definite after damping")
    return basis, found[1].clamp(max=1).to(whole.dtype)


def _common_basis(part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor] | None:
    triangle, info = torch.linalg.cholesky_ex(whole)
    half = torch.linalg.solve_triangular(triangle, part, upper=False)
    whitened = torch.linalg.solve_triangular(triangle, half.mT, upper=False)
    # On some back ends, a NaN passes LAPACK's pivot test.
    if not bool((info == 0) & torch.isfinite(whitened.sum())):
        return None
    values, vectors = eigh((whitened + whitened.mT) / 2)
    return torch.linalg.solve_triangular(triangle.mT, vectors, upper=True), values
