"""The spectral norm by warm-started subspace iteration."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_so2.linalg.errors import retried_in_float64

# Squares of entries between this and its inverse, and sums of them, are far from the ends of float32's range.
SAFE = 1e8


def spectral_norm(matrix: Tensor, basis: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Largest singular value of `X` by block power iteration on `XᵀX` with a Rayleigh-Ritz estimate at the end.

    The estimate approaches the norm from below, by the ratio of the first singular value to the one after the block: a
    single vector is caught between neighbouring singular values, which updates of K-FAC have many of.

    Args:
        matrix: X, shape (m, n).
        basis: start, shape (n, k) with k ≤ min(m, n), orthonormal columns from the last call; all zeros asks for a cold
            start.
        iterations: how many products with `XᵀX`.

    Returns:
        The norm (0-dim, 0 for a zero matrix) and the orthonormal basis for the next call. A zero matrix hands `basis`
        back unchanged, so that an update of zero does not lose the warm start.

    Raises:
        DecompositionError: a decomposition of the candidates fails, in float64 too.
    """
    missing = f"a {tuple(matrix.shape)} matrix has no spectral norm"
    norm, candidates = retried_in_float64(partial(_spectral_norm, iterations), matrix, basis, missing=missing)
    return norm.to(matrix.dtype), candidates.to(matrix.dtype)


def _spectral_norm(iterations: int, matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    matrix, unit = _in_range(matrix)
    image, candidates = matrix @ basis, basis
    is_lost = ~image.any()
    for iteration in range(iterations):
        # As (k, n) the product is quicker, and its transpose is stored the way LAPACK wants it.
        product = image.mT @ matrix
        # Elsewhere than on a CPU looking would wait.
        if iteration == 0 and (matrix.device.type != "cpu" or bool(is_lost)):
            product = torch.where(is_lost, _longest_rows(matrix, basis.shape[1]), product)
        candidates = torch.linalg.qr(product.mT).Q
        image = matrix @ candidates
    # LAPACK refuses what is not finite; the caller gets it back as a norm that is not finite either.
    gram = (image.mT @ image).nan_to_num()
    norm = torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt() * unit
    return norm, torch.where(norm > 0, candidates, basis)


def _in_range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`X / c` and c, 0-dim, so that products of entries stay in the range of the dtype.

    Relative to the largest entry they do.
    """
    lowest, highest = torch.aminmax(matrix)
    largest = torch.maximum(-lowest, highest)
    one = torch.ones_like(largest)
    # A copy costs as much as two of the products; elsewhere than on a CPU looking would wait.
    if matrix.device.type == "cpu" and 1 / SAFE <= float(largest) <= SAFE:
        return matrix, one
    unit = torch.where(largest > 0, largest, one)
    return matrix / unit, unit


def _longest_rows(matrix: Tensor, count: int) -> Tensor:
    """(count, n). They are never all orthogonal to the leading singular vector in practice, need no random numbers, and
    so are the same on every rank and after a resume: a start in place of one that the matrix maps to zero, from which
    there would be no way out.
    """
    return matrix[torch.linalg.vector_norm(matrix, dim=1).topk(count).indices]
