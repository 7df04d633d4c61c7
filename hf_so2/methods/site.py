"""The place of a curvature block in the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_so2.curvature import Blocked, GradientBlock
from hf_so2.methods.settings import Settings
from hf_so2.mup import ParameterWidth


@dataclass(frozen=True)
class Site:
    """The place of a block in the model.

    Args:
        shape: (fan_out, fan_in) of the weight, with a column for its bias if the bias belongs to the block.
        width: role of the weight and its growth with the width.
        diagonal: the sides, of "A" and "B", whose factor is a diagonal.
        one_sided: whether only the input side is preconditioned.
        tied: whether the weight is used both as an embedding and as the head.
    """

    shape: tuple[int, int]
    width: ParameterWidth
    diagonal: str = ""
    one_sided: bool = False
    tied: bool = False

    def sides(self, settings: Settings) -> frozenset[str]:
        """The sides of a gradient that are preconditioned: those that are small enough, or all if cut into blocks."""
        limit = math.inf if settings.block_size else settings.max_preconditioner_dim
        return frozenset(side for side, dim in zip("LR", self.shape, strict=True) if dim <= limit)

    def cut(self, block: GradientBlock, settings: Settings) -> GradientBlock:
        """The block; for a weight larger than `block_size`, one block for each part."""
        size = settings.block_size
        return Blocked(block, size, self.shape) if size and max(self.shape) > size else block
