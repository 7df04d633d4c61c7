"""The spectral norm by warm-started subspace iteration."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_so2.linalg.errors import retried_in_float64

# Squares of entries between this and its inverse, and sums of them, are far from the ends of float32's range.
SAFE = 1e8

# Relative to the trace of a Gram matrix in float64: far below what float32 columns resolve, and enough for a pivot.
SHIFT = 1e-14


def spectral_norm(matrix: Tensor, basis: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Largest singular value of `X` by block power iteration on `XᵀX` with a Rayleigh-Ritz estimate at the end.

    The estimate approaches the norm from below, by the ratio of the first singular value to the one after the block: a
    single vector is caught between neighbouring singular values, which updates of K-FAC have many of.

    Args:
        matrix: X, shape (..., m, n).
        basis: start, shape (..., n, k) with k ≤ min(m, n), columns from the last call; one of zeros is replaced by a
            long row of X, all of them for a cold start.
        iterations: how many products with `XᵀX`.

    Returns:
        The norms, shape (...), 0 for a zero matrix, and the bases for the next call: orthonormal columns, and zeros in
        place of those that round-off has chosen. A zero matrix hands its basis back unchanged, so that an update of
        zero does not lose the warm start.

    Raises:
        DecompositionError: a decomposition of the candidates fails, in float64 too.
    """
    missing = f"a {tuple(matrix.shape)} matrix has no spectral norm"
    norm, candidates = retried_in_float64(partial(_spectral_norm, iterations), matrix, basis, missing=missing)
    return norm.to(matrix.dtype), candidates.to(matrix.dtype)


def _spectral_norm(iterations: int, matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    matrix, unit = _in_range(matrix)
    image, candidates = matrix @ basis, basis
    is_lost = ~image.any(dim=-2)
    for iteration in range(iterations):
        # As (k, n) the product is quicker, and its transpose is stored the way LAPACK wants it.
        product = image.mT @ matrix
        # Elsewhere than on a CPU looking would wait.
        if iteration == 0 and (matrix.device.type != "cpu" or bool(is_lost.any())):
            product = torch.where(is_lost.unsqueeze(-1), _longest_rows(matrix, basis.shape[-1]), product)
        candidates = orthonormal(product.mT)
        image = matrix @ candidates
    # LAPACK refuses what is not finite; the caller gets it back as a norm that is not finite either.
    gram = (image.mT @ image).nan_to_num()
    norm = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()
    # Products with XᵀX resolve no singular value below √ε of the largest: those directions are round-off.
    least = norm * torch.finfo(matrix.dtype).eps ** 0.5
    is_resolved = gram.diagonal(dim1=-2, dim2=-1).sqrt() > least.unsqueeze(-1)
    candidates = torch.where(is_resolved.unsqueeze(-2), candidates, torch.zeros_like(unit)[..., None, None])
    return norm * unit, torch.where((norm > 0)[..., None, None], candidates, basis)


def orthonormal(columns: Tensor) -> Tensor:
    """A basis of what a few columns span, shape (..., n, k) with k ≤ n.

    By QR on a CPU. A GPU makes a QR of few columns one column after the other and one matrix after the other; the
    Cholesky factor of the Gram matrix takes two products, of all matrices at once. Float64 squares the condition number
    of float32 columns without harm. Columns that are zero, or depend on others, come out shorter than 1.
    """
    if columns.device.type == "cpu":
        return torch.linalg.qr(columns).Q
    return orthonormal_by_cholesky(columns)


def orthonormal_by_cholesky(columns: Tensor) -> Tensor:
    wide = columns.double()
    gram = (wide.mT @ wide).nan_to_num()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Never zero, for the pivots of a matrix of zeros.
    diagonal.add_(diagonal.sum(dim=-1, keepdim=True) * SHIFT + torch.finfo(gram.dtype).tiny)
    triangle, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(triangle.mT, wide, upper=True, left=False).to(columns.dtype)


def _in_range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`X / c` and c, shape (...), so that products of entries stay in the range of the dtype.

    Relative to the largest entry they do.
    """
    largest = largest_entry(matrix)
    # A copy costs as much as two of the products; elsewhere than on a CPU looking would wait.
    if matrix.device.type == "cpu" and bool(((largest >= 1 / SAFE) & (largest <= SAFE)).all()):
        return matrix, torch.ones_like(largest)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    return matrix / unit[..., None, None], unit


def largest_entry(matrix: Tensor) -> Tensor:
    """In magnitude, shape (...) for (..., m, n)."""
    if matrix.ndim == 2:  # at once, without a copy
        lowest, highest = torch.aminmax(matrix)
        return torch.maximum(-lowest, highest)
    return torch.maximum(-matrix.amin(dim=(-2, -1)), matrix.amax(dim=(-2, -1)))


def _longest_rows(matrix: Tensor, count: int) -> Tensor:
    """(..., count, n). They are never all orthogonal to the leading singular vector in practice, need no random
    numbers, and so are the same on every rank and after a resume: a start in place of one that the matrix maps to zero,
    from which there would be no way out.
    """
    longest = torch.linalg.vector_norm(matrix, dim=-1).topk(count).indices
    return matrix.take_along_dim(longest.unsqueeze(-1), dim=-2)
