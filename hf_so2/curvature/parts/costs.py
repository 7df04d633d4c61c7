"""FLOPs of the blocks' operations, as functions of the shape. A multiplication with its addition counts as two.

Every block states its costs in its own file. This file has the costs that several blocks share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

# In units of n³: eigenvalues and eigenvectors by the symmetric QR algorithm; an explicit Q of Householder's
# factorization (Golub & Van Loan 2013, sections 8.3 and 5.2); a product of two (n, n) matrices; the Cholesky factor and
# the inverse computed from it.
EIGENDECOMPOSITION, QR, PRODUCT, CHOLESKY_INVERSE = 9.0, 8 / 3, 2.0, 1.0

Shape = tuple[int, int]


class Block(Protocol):
    """The part of a block that this file needs."""

    def init_state(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]: ...

    @property
    def refreshed(self) -> list[str]: ...


def shapes(block: Block, shape: Shape) -> dict[str, Tensor]:
    """The block's state on the meta device: shapes without memory."""
    return block.init_state(shape, torch.device("meta"), torch.float32)


def decomposed(block: Block, shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, dimension and block width of every matrix that a decomposition of a factor gives.

    Diagonals are left out: they cost almost nothing.
    """
    state = shapes(block, shape)
    for name in block.refreshed:
        if name.endswith(("_root", "_basis")) and state[name].ndim == 2:
            size, width = state[name].shape
            yield name, size, width


def of_roots(block: Block, shape: Shape) -> float:
    """FLOPs of a refresh that decomposes every factor and multiplies the parts again."""
    return sum((EIGENDECOMPOSITION + PRODUCT) * n * width**2 for _, n, width in decomposed(block, shape))


def of_preconditioning(block: Block, shape: Shape) -> float:
    """FLOPs of one product with each root, or two with each basis."""
    products = sum(width * (2 if name.endswith("_basis") else 1) for name, _, width in decomposed(block, shape))
    return PRODUCT * products * shape[0] * shape[1]


def of_tokens(block: Block, shape: Shape, tokens: int) -> float:
    """FLOPs of the products of all rows: one for every factor that is a matrix, every basis, and the diagonal S."""
    state = shapes(block, shape)
    matrices = [state[name] for name in ("A", "B") if name in state and state[name].ndim == 2]
    matrices += [matrix for name, matrix in state.items() if name.endswith("_basis") or name == "S"]
    return PRODUCT * tokens * sum(map(Tensor.numel, matrices))


def of_sides(state: Mapping[str, Tensor], names: Iterable[str], shape: Shape) -> float:
    """FLOPs of one product of a gradient with each of these square matrices, or with itself to form each of them."""
    return PRODUCT * sum(len(state[name]) for name in names) * shape[0] * shape[1]
