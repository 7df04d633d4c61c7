"""A preconditioned weight: its settings, the rank that owns it, and its curvature state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_so2.curvature import CurvatureBlock, State
from hf_so2.curvature.base import RotatingBlock
from hf_so2.damping import Damping
from hf_so2.layers import Adapter

# The counters of a layer. A checkpoint keeps them.
COUNTERS = ("updates", "refreshes", "failures", "steps", "overflows", "rows")


@dataclass
class Layer:
    """A preconditioned weight.

    Args:
        name: qualified name of the parameter. One of several matrices in it has a name of its own:
            `experts.down_proj[3]`, `q_proj.weight[head 3]`.
        shape: (fan_out, fan_in), the column of the bias included.
        block: the curvature method.
        modules: the modules whose calls use the weight.
        adapter: how these modules store the weight.
        damping: rule, strength and width multipliers.
        device: the device of the statistics.
        dtype: dtype of the statistics: float32, or float64 for a float64 weight.
        bias: the parameter that is the last column of the matrix.
        head: for a tied weight, the modules that use it as an output head; `modules` are then its embeddings.
        is_head: whether the weight is the output head, and nothing else.
        home: the rank that has all of the weight, if it is one of several matrices of a sharded parameter and one has.
        owner: the rank that refreshes the preconditioner.
        owned: whether this rank is the owner.
        held: whether this rank holds the layer: it has the statistics and the preconditioner, and it preconditions the
            gradient.
        state: on a rank that holds the layer, the tensors of the block, of norm control and of momentum. On any other
            rank, the tensors of the block alone: real tensors under the names in the block's `observed`, and tensors on
            the meta device, which have only a shape, under all others.
        updates: number of updates of the statistics.
        refreshes: number of preconditioners built. Before the first one, the fallback updates the weight.
        failures: number of failed refreshes in a row.
        steps: number of second-order updates of the weight.
        overflows: how many of these updates were set to zero because the preconditioned gradient was not finite, or
            because linear algebra failed in the norm control. Only ranks that hold the layer count them.
        rows: number of rows in the last update of the statistics of tokens, over all ranks.
        momentum: decay of the average of gradients at this step, taken from the parameter group.
        rotated: this step's gradient in the block's coordinates. It is kept while these are the coordinates of the
            preconditioner.
        is_idle: whether no token reached the layer in this step. Only a matrix of a stack, such as one expert, can be
            idle; its gradient is then zero. An idle layer skips the step: statistics, momentum, weight decay and
            update.
    """

    name: str
    shape: tuple[int, int]
    block: CurvatureBlock
    modules: Sequence[nn.Module]
    adapter: Adapter
    damping: Damping
    device: torch.device
    dtype: torch.dtype
    bias: str | None = None
    head: Sequence[nn.Module] = ()
    is_head: bool = False
    home: int | None = None
    owner: int = 0
    owned: bool = True
    held: bool = True
    state: State = field(default_factory=dict)
    updates: int = 0
    refreshes: int = 0
    failures: int = 0
    steps: int = 0
    overflows: int | Tensor = 0
    rows: int = 0
    rotated: Tensor | None = None
    momentum: float = 0.0
    is_idle: bool = False

    @property
    def parameter(self) -> str:
        """The name of the parameter: the weight itself, or the one that it is one of several matrices of."""
        return self.name if self.adapter.window is None else self.name.rpartition("[")[0]

    @cached_property
    def rotating(self) -> RotatingBlock | None:
        """The block if it keeps the momentum in its own coordinates, else None. Cached: the protocol check is slow."""
        return self.block if isinstance(self.block, RotatingBlock) and self.block.keeps_momentum else None

    @property
    def building(self) -> bool:
        """Whether the block is still building what its first update needs (SOAP's first basis).

        The weight and its momentum do not move until then.
        """
        return self.updates <= self.block.building_steps

    @property
    def nbytes(self) -> int:
        """Size of the gradient in bytes, in the dtype of the statistics."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blank_state(self) -> State:
        """The block's tensors before the first update, on the meta device where this rank does not have them."""
        if self.held:
            return self.block.init_state(self.shape, self.device, self.dtype)
        shapes = self.block.init_state(self.shape, torch.device("meta"), self.dtype)
        return shapes | {name: torch.zeros_like(shapes[name], device=self.device) for name in self.block.observed}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copy what this rank needs from a complete state.

        Raises:
            ValueError: a tensor of the block is missing or has another shape.
        """
        blank = self.block.init_state(self.shape, torch.device("meta"), self.dtype)
        for name, expected in blank.items():
            shape = saved[name].shape if name in saved else None
            if shape != expected.shape:
                raise ValueError(f"{self.name}: saved {name} has shape {shape}, expected {expected.shape}")
        needed = saved.keys() if self.held else self.block.observed
        own = {name: saved[name].to(self.device, self.dtype, copy=True) for name in needed}
        self.state = own if self.held else blank | own

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move or cast the state like a model that was moved or cast after its optimizer had been built.

        Args:
            device: the new device of the statistics.
            dtype: the new dtype of the statistics, see `statistics_dtype`.
        """
        if (self.device, self.dtype) != (device, dtype):
            self.device, self.dtype = device, dtype
            self.state = {n: t.to(dtype) if t.is_meta else t.to(device, dtype) for n, t in self.state.items()}


def statistics_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of a weight of dtype `weight`: float32, or float64 for float64."""
    return torch.float64 if weight == torch.float64 else torch.float32
