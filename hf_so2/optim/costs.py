"""What a layer costs: FLOPs of its work, and numbers that are kept and sent for it. Pure functions of the shape.

A multiplication with the addition that goes with it counts as two FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import cast

import torch
from torch import Tensor

from hf_so2.curvature import (
    EKFAC,
    KFAC,
    SOAP,
    Blocked,
    CurvatureBlock,
    GradientBlock,
    KLShampoo,
    Muon,
    State,
    TokenBlock,
)
from hf_so2.distributed import Parcel

# In units of n³. Eigenvalues and vectors by the symmetric QR algorithm, and an explicit Q of Householder's
# factorization (Golub & Van Loan 2013, sections 8.3 and 5.2); a product of two (n, n) matrices; Cholesky's factor with
# the inverse made from it.
EIGENDECOMPOSITION, QR, PRODUCT, CHOLESKY_INVERSE = 9.0, 8 / 3, 2.0, 1.0

# Of torch's Newton-Schulz iteration.
MUON_STEPS = 5

Shape = tuple[int, int]


def shapes(block: CurvatureBlock, shape: Shape) -> State:
    """The block's state without memory for it."""
    return block.init_state(shape, torch.device("meta"), torch.float32)


def decomposed(block: CurvatureBlock, shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, dimension and width (of its blocks) of every matrix that comes from decomposing a factor.

    Diagonals cost next to nothing.
    """
    state = shapes(block, shape)
    for name in block.refreshed:
        if name.endswith(("_root", "_basis")) and state[name].ndim == 2:
            size, width = state[name].shape
            yield name, size, width


@singledispatch
def refresh_flops(block: CurvatureBlock, shape: Shape) -> float:
    """Of one refresh: by default each factor is decomposed and put together again."""
    return sum((EIGENDECOMPOSITION + PRODUCT) * n * width**2 for _, n, width in decomposed(block, shape))


@refresh_flops.register
def _(block: KFAC, shape: Shape) -> float:
    """An inverse takes no eigendecomposition."""
    exponents = block.exponents
    return sum(
        n * width**2 * (CHOLESKY_INVERSE if exponents[name[0]] == 1 else EIGENDECOMPOSITION + PRODUCT)
        for name, n, width in decomposed(block, shape)
    )


@refresh_flops.register
def _(block: EKFAC, shape: Shape) -> float:
    """Each basis is compared with the last one, and S moves along."""
    fan_out, fan_in = shape
    return sum(
        (EIGENDECOMPOSITION + PRODUCT) * n * width**2 + PRODUCT * width * fan_out * fan_in
        for _, n, width in decomposed(block, shape)
    )


@refresh_flops.register
def _(block: SOAP, shape: Shape) -> float:
    """As EKFAC's, but for a power step in place of most decompositions: a product and a QR factorization."""
    share = 1 / block.full_every
    basis = share * EIGENDECOMPOSITION + (1 - share) * (PRODUCT * (1 + (block.tolerance > 0)) + QR)
    turned = _rotation_flops(block, shape) * (1 + block.keeps_momentum)
    return turned + sum((basis + PRODUCT) * n**3 for _, n, _ in decomposed(block, shape))


@refresh_flops.register
def _(block: Blocked, shape: Shape) -> float:
    return sum(refresh_flops(block.block, part) for part in block.parts)


@singledispatch
def precondition_flops(block: CurvatureBlock, shape: Shape) -> float:
    """Of one step: a product with each root, two with each basis."""
    fan_out, fan_in = shape
    products = sum(width * (2 if name.endswith("_basis") else 1) for name, _, width in decomposed(block, shape))
    return PRODUCT * products * fan_out * fan_in


@precondition_flops.register
def _(block: Muon, shape: Shape) -> float:
    """Newton-Schulz on the smaller side: two products with the matrix and one of its squares, each time."""
    small, large = sorted(shape)
    return MUON_STEPS * PRODUCT * (2 * small**2 * large + small**3)


@precondition_flops.register
def _(block: Blocked, shape: Shape) -> float:
    return sum(precondition_flops(block.block, part) for part in block.parts)


def statistics_flops(block: CurvatureBlock, shape: Shape, tokens: int) -> float:
    """Of one update of the statistics: on every rank from its own tokens, or from the gradient where a rank holds the
    layer.

    Args:
        tokens: rows that the layer sees on a rank; of no meaning where only gradients are seen.
    """
    if isinstance(block, Blocked):
        return sum(statistics_flops(block.block, part, tokens) for part in block.parts)
    fan_out, fan_in = shape
    state = shapes(block, shape)
    sides = [state[name] for name in ("A", "B", "L", "R") if name in state and state[name].ndim == 2]
    bases = [state[name] for name in state if name.endswith("_basis")]
    if isinstance(block, GradientBlock):
        # KL-Shampoo whitens the gradient by the other side before either product, SOAP takes it into its bases.
        whitenings = sides if isinstance(block, KLShampoo) and len(sides) == 2 else []
        return PRODUCT * sum(map(len, [*sides, *bases, *whitenings])) * fan_out * fan_in
    diagonal = fan_out * fan_in if "S" in state else 0
    return PRODUCT * tokens * (sum(matrix.numel() for matrix in (*sides, *bases)) + diagonal)


def held_flops(block: CurvatureBlock, shape: Shape) -> float:
    """Of one step on each rank that holds the layer: preconditioning, and statistics where these are of gradients."""
    flops = precondition_flops(block, shape) + statistics_flops(block, shape, tokens=0)
    # What is rotated for the statistics is not rotated again.
    return flops - _rotation_flops(block, shape) if isinstance(block, SOAP) and block.keeps_momentum else flops


def _rotation_flops(block: SOAP, shape: Shape) -> float:
    """Of a matrix of that shape, into both bases or out of them."""
    return sum(PRODUCT * n * shape[0] * shape[1] for _, n, _ in decomposed(block, shape))


def state_numbers(block: CurvatureBlock, shape: Shape) -> int:
    """How many numbers a rank keeps that holds the layer; those of norm control aside, and momentum that the block does
    not keep itself."""
    return sum(tensor.numel() for tensor in shapes(block, shape).values())


def observed_numbers(block: CurvatureBlock, shape: Shape) -> int:
    """How many of them every rank keeps."""
    state = shapes(block, shape)
    return sum(state[name].numel() for name in block.observed)


def statistics_sent(block: CurvatureBlock, shape: Shape) -> int:
    """How many numbers are added up over ranks at each update of the statistics: none where only gradients are seen,
    which are the same on all ranks.
    """
    if isinstance(block, GradientBlock):
        return 0
    state = shapes(block, shape)
    statistics = cast(TokenBlock, block).statistics
    return sum(sent(state[name], symmetric=statistic.symmetric) for name, statistic in statistics.items())


def preconditioner_sent(block: CurvatureBlock, shape: Shape) -> int:
    """How many numbers an owner sends to the other ranks that hold the layer, at each refresh."""
    state = shapes(block, shape)
    return sum(sent(state[name], symmetric=is_symmetric(name)) for name in block.refreshed)


def is_symmetric(name: str) -> bool:
    """Whether what a refresh writes is a symmetric matrix, wherever it is a matrix."""
    return name.endswith("_root")


def is_square(tensor: Tensor) -> bool:
    """Whether it is a matrix of one block, of which a triangle tells all if it is symmetric."""
    return tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]


def sent(tensor: Tensor, *, symmetric: bool) -> int:
    """How many numbers travel for a tensor: of a symmetric matrix, one triangle."""
    return Parcel(tensor, symmetric=symmetric and is_square(tensor)).numel
