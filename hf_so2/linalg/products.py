"""Matrix products with a symmetric result."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.linalg.block_diagonal import blocks, is_cut

# Narrower strips are slow to multiply, wider ones compute more twice; of few rows a product costs less than a mirror.
STRIPS, LEAST, LEAST_ROWS = 4, 256, 512


def trace(matrix: Tensor) -> Tensor:
    """Shape (...) for (..., n, n), block-diagonal ones included."""
    if is_cut(matrix):
        return torch.stack([trace(block) for block in blocks(matrix)]).sum(dim=0)
    return matrix.trace() if matrix.ndim == 2 else matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def per_matrix(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers of shape (...) with as many dimensions as what they multiply, shape (..., *): one for each matrix."""
    return numbers.reshape(numbers.shape + (1,) * (like.ndim - numbers.ndim)) if numbers.ndim else numbers


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`XᵀY`, known to be symmetric, such as `Xᵀ diag(w) X`.

    On a CPU the part above the diagonal is computed in strips and mirrored: 5/8 of the FLOPs, and 0.8 of the time at
    256 to 2048 dimensions and 1024 rows. Elsewhere, and of few rows, it is one product.

    Args:
        left: X, shape (rows, n).
        right: Y, the same.

    Returns:
        Shape (n, n).
    """
    rows, size = left.shape
    if left.device.type != "cpu" or size < LEAST or rows < LEAST_ROWS:
        return left.mT @ right
    product = left.new_empty(size, size)
    width = -(-size // STRIPS)
    for start in range(0, size, width):
        end = start + width
        torch.mm(left[:, start:end].mT, right[:, start:], out=product[start:end, start:])
        product[start:end, :start] = product[:start, start:end].mT
    return product
