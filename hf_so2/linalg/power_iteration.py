"""The spectral norm by warm-started subspace iteration."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_so2.linalg.errors import retried_in_float64

# If entries lie between this number and its inverse, their squares, and sums of these, are far from float32's limits.
SAFE = 1e8

# Shift relative to the trace of a Gram matrix in float64. It is far below the resolution of float32 columns, and large
# enough for a pivot.
SHIFT = 1e-14


def spectral_norm(matrix: Tensor, basis: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The largest singular value of `X`, by block power iteration on `XᵀX` with a Rayleigh-Ritz estimate at the end.

    The estimate approaches the norm from below. Its rate is the ratio of the first singular value to the first one
    after the block. A single vector is slow between close singular values, and updates of K-FAC have many of these.

    Args:
        matrix: X, shape (..., m, n).
        basis: start, shape (..., n, k) with k ≤ min(m, n): the columns from the last call. A column of zeros is
            replaced by a long row of X. All columns are zero for a cold start.
        iterations: number of products with `XᵀX`.

    Returns:
        The norms, shape (...), 0 for a zero matrix, and the bases for the next call. Their columns are orthonormal, and
        zero where round-off has determined the direction. The basis of a zero matrix is returned unchanged, so that an
        update of zero does not lose the warm start.

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
        # The product is faster in the shape (k, n), and its transpose has the layout that LAPACK needs.
        product = image.mT @ matrix
        # On other devices than a CPU, the check would wait for the device.
        if iteration == 0 and (matrix.device.type != "cpu" or bool(is_lost.any())):
            product = torch.where(is_lost.unsqueeze(-1), _longest_rows(matrix, basis.shape[-1]), product)
        candidates = orthonormal(product.mT)
        image = matrix @ candidates
    # LAPACK refuses numbers that are not finite. The caller then gets a norm that is not finite.
    gram = (image.mT @ image).nan_to_num()
    norm = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()
    # Products with XᵀX resolve no singular value below √ε times the largest. These directions are round-off.
    least = norm * torch.finfo(matrix.dtype).eps ** 0.5
    is_resolved = gram.diagonal(dim1=-2, dim2=-1).sqrt() > least.unsqueeze(-1)
    candidates = torch.where(is_resolved.unsqueeze(-2), candidates, torch.zeros_like(unit)[..., None, None])
    return norm * unit, torch.where((norm > 0)[..., None, None], candidates, basis)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of a few columns, shape (..., n, k) with k ≤ n.

    A CPU uses QR. A GPU would compute a QR of few columns one column and one matrix after the other. So it uses the
    Cholesky factor of the Gram matrix, which needs two products for all matrices together. The Gram matrix squares the
    condition number. This does no harm in float64, since the columns are float32. Columns that are zero, or that depend
    on others, become shorter than 1.
    """
    if columns.device.type == "cpu":
        return torch.linalg.qr(columns).Q
    return orthonormal_by_cholesky(columns)


def orthonormal_by_cholesky(columns: Tensor) -> Tensor:
    wide = columns.double()
    gram = (wide.mT @ wide).nan_to_num()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Never zero: a matrix of zeros needs pivots too.
    diagonal.add_(diagonal.sum(dim=-1, keepdim=True) * SHIFT + torch.finfo(gram.dtype).tiny)
    triangle, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(triangle.mT, wide, upper=True, left=False).to(columns.dtype)


def _in_range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`X / c` and c, shape (...). Products of entries of `X / c` stay in the range of the dtype.

    c is the largest entry, or 1 if no scaling is needed.
    """
    largest = largest_entry(matrix)
    # A copy costs as much as two of the products. On other devices than a CPU, the check would wait for the device.
    if matrix.device.type == "cpu" and bool(((largest >= 1 / SAFE) & (largest <= SAFE)).all()):
        return matrix, torch.ones_like(largest)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    return matrix / unit[..., None, None], unit


def largest_entry(matrix: Tensor) -> Tensor:
    """The largest magnitude of an entry, shape (...) for (..., m, n)."""
    if matrix.ndim == 2:  # both in one call, without a copy
        lowest, highest = torch.aminmax(matrix)
        return torch.maximum(-lowest, highest)
    return torch.maximum(-matrix.amin(dim=(-2, -1)), matrix.amax(dim=(-2, -1)))


def _longest_rows(matrix: Tensor, count: int) -> Tensor:
    """The `count` longest rows, (..., count, n).

    They replace a start that the matrix maps to zero: the iteration could never leave such a start. In practice they
    are never all orthogonal to the leading singular vector. They need no random numbers, so they are the same on every
    rank and after a resume.
    """
    longest = torch.linalg.vector_norm(matrix, dim=-1).topk(count).indices
    return matrix.take_along_dim(longest.unsqueeze(-1), dim=-2)
