"""Linear maps of torch and transformers as `(fan_out, fan_in)` matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Adapter:
    """How a module stores its weight, and what inputs it takes. No other code depends on the layout.

    Args:
        transposed: whether the weight is stored as (fan_in, fan_out), as in GPT-2's `Conv1D` and in an embedding.
        one_hot: whether the module takes indices, each of which stands for a unit vector: an embedding.
        ignored_index: the index whose row of the weight gets no gradient: an embedding's `padding_idx`.
        has_bias: whether the bias belongs to the matrix, as a last column with an input of 1.
        index: index of this matrix in a stack (of experts), along the first dimension of a 3-D weight.
        rows: (start, stop) of the outputs that this matrix computes, where it is one of several in a 2-D weight: of an
            attention head.
    """

    transposed: bool = False
    one_hot: bool = False
    ignored_index: int | None = None
    has_bias: bool = False
    index: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def window(self) -> tuple[int, int, int] | None:
        """What `Tensor.narrow` takes, (dimension, start, length), to find this matrix in its parameter; None for all of
        it."""
        if self.index is not None:
            return 0, self.index, 1
        if self.rows is not None:
            start, stop = self.rows
            return int(self.transposed), start, stop - start
        return None

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight (or its gradient, or its momentum) as a (fan_out, fan_in) view that writes through."""
        return self.as_matrix(tensor if self.window is None else tensor.narrow(*self.window))

    def as_matrix(self, stored: Tensor) -> Tensor:
        """What `window` leaves of a tensor as a (fan_out, fan_in) view."""
        matrix = stored if self.index is None else stored.squeeze(0)
        return matrix.mT if self.transposed else matrix

    def as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`, also a view."""
        stored = matrix.mT if self.transposed else matrix
        return stored if self.index is None else stored.unsqueeze(0)


LINEAR = Adapter()
CONV1D = Adapter(transposed=True)


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a module whose `weight` is a plain linear map of its one input, or None.

    Subclasses of `Embedding` scale or shift the vectors that they look up, and some options change the gradient. These
    have no adapter.
    """
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, Conv1D):
        return CONV1D
    if type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm):
        return Adapter(transposed=True, one_hot=True, ignored_index=module.padding_idx)
    return None
