"""How many numbers are kept and sent for a layer, and how many FLOPs a rank that holds it does.

Each block states its own FLOPs.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from hf_so2.curvature import SOAP, CurvatureBlock, GradientBlock, TokenBlock
from hf_so2.curvature.parts.costs import Shape, shapes
from hf_so2.distributed import Parcel


def held_flops(block: CurvatureBlock, shape: Shape) -> float:
    """FLOPs of one step on each rank that holds the layer: preconditioning, and the statistics of gradients if any."""
    flops = block.precondition_flops(shape) + block.statistics_flops(shape, tokens=0)
    # A gradient that is rotated for the statistics is not rotated again. This saves half of all rotations.
    return flops - block.precondition_flops(shape) / 2 if isinstance(block, SOAP) and block.keeps_momentum else flops


def state_numbers(block: CurvatureBlock, shape: Shape) -> int:
    """How many numbers each rank that holds the layer keeps.

    Norm control's numbers do not count, nor does momentum that the block does not keep itself.
    """
    return sum(tensor.numel() for tensor in shapes(block, shape).values())


def observed_numbers(block: CurvatureBlock, shape: Shape) -> int:
    """How many of these numbers every rank keeps."""
    state = shapes(block, shape)
    return sum(state[name].numel() for name in block.observed)


def statistics_sent(block: CurvatureBlock, shape: Shape) -> int:
    """How many numbers are summed over ranks at each update of the statistics.

    None for a block that sees only gradients, since these are the same on all ranks.
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
    """Whether the tensor of this name, which a refresh writes, is symmetric if it is a matrix."""
    return name.endswith("_root")


def is_square(tensor: Tensor) -> bool:
    """Whether the tensor is a square matrix of one block. If it is also symmetric, a triangle determines it."""
    return tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]


def sent(tensor: Tensor, *, symmetric: bool) -> int:
    """How many numbers are sent for a tensor: one triangle of a symmetric matrix, else all."""
    return Parcel(tensor, symmetric=symmetric and is_square(tensor)).numel
