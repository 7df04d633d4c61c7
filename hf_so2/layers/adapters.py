"""Linear maps of the libraries as `(fan_out, fan_in)` matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Adapter:
    """How a module stores its weight. GPT-2's `Conv1D` keeps the transpose; nothing behind this class has to know."""

    transposed: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight (or its gradient, or its momentum) as a (fan_out, fan_in) view that writes through."""
        return tensor.mT if self.transposed else tensor

    @staticmethod
    def rows(tensor: Tensor) -> Tensor:
        """Inputs or output gradients of shape (..., fan) as (rows, fan)."""
        return tensor.reshape(-1, tensor.shape[-1])


LINEAR = Adapter()
CONV1D = Adapter(transposed=True)


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a module whose `weight` is a plain linear map of its one input, or None."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, Conv1D):
        return CONV1D
    return None
