"""What is kept and sent for a layer, in numbers, and what a rank that holds it works; FLOPs are the block's to say."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from hf_so2.curvature import SOAP, CurvatureBlock, GradientBlock, TokenBlock
from hf_so2.curvature.parts.costs import Shape, shapes
from hf_so2.distributed import Parcel


def held_flops(block: CurvatureBlock, shape: Shape) -> float:
    """Of one step on each rank that holds the layer: preconditioning, and statistics where these are of gradients."""
    flops = block.precondition_flops(shape) + block.statistics_flops(shape, tokens=0)
    # What is rotated for the statistics is not rotated again: half of all rotations.
    return flops - block.precondition_flops(shape) / 2 if isinstance(block, SOAP) and block.keeps_momentum else flops


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
