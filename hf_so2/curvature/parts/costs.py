"""FLOPs of what blocks do, as functions of the shape. A multiplication with the addition that goes with it counts two.

Every block says what it costs in its own file; here is what several share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

# In units of n³. Eigenvalues and vectors by the symmetric QR algorithm, and an explicit Q of Householder's
# factorization (Golub & Van Loan 2013, sections 8.3 and 5.2); a product of two (n, n) matrices; Cholesky's factor with
# the inverse made from it.
EIGENDECOMPOSITION, QR, PRODUCT, CHOLESKY_INVERSE = 9.0, 8 / 3, 2.0, 1.0

Shape = tuple[int, int]


class Block(Protocol):
    """What is asked of a block here."""

    def init_state(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]: ...

    @property
    def refreshed(self) -> list[str]: ...


def shapes(block: Block, shape: Shape) -> dict[str, Tensor]:
    """The block's state without memory for it."""
    return block.init_state(shape, torch.device("meta"), torch.float32)


def decomposed(block: Block, shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, dimension and width (of its blocks) of every matrix that comes from decomposing a factor.

    Diagonals cost next to nothing.
    """
    state = shapes(block, shape)
    for name in block.refreshed:
        if name.endswith(("_root", "_basis")) and state[name].ndim == 2:
            size, width = state[name].shape
            yield name, size, width


def of_roots(block: Block, shape: Shape) -> float:
    """Of a refresh that takes every factor apart and puts it together again."""
    return sum((EIGENDECOMPOSITION + PRODUCT) * n * width**2 for _, n, width in decomposed(block, shape))


def of_preconditioning(block: Block, shape: Shape) -> float:
    """Of a product with each root, or two with each basis."""
    products = sum(width * (2 if name.endswith("_basis") else 1) for name, _, width in decomposed(block, shape))
    return PRODUCT * products * shape[0] * shape[1]


def of_tokens(block: Block, shape: Shape, tokens: int) -> float:
    """Of a product of all rows for every factor that is a matrix, every basis and the diagonal S in the bases."""
    state = shapes(block, shape)
    matrices = [state[name] for name in ("A", "B") if name in state and state[name].ndim == 2]
    matrices += [matrix for name, matrix in state.items() if name.endswith("_basis") or name == "S"]
    return PRODUCT * tokens * sum(map(Tensor.numel, matrices))


def of_sides(state: Mapping[str, Tensor], names: Iterable[str], shape: Shape) -> float:
    """Of one product of a gradient with each of these square matrices, or with itself to make them."""
    return PRODUCT * sum(len(state[name]) for name in names) * shape[0] * shape[1]
