"""A preconditioned weight: what it is, where it is held, and what is known of its curvature."""

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

# What a layer counts and a checkpoint keeps.
COUNTERS = ("updates", "refreshes", "failures", "steps", "overflows")


@dataclass
class Layer:
    """A preconditioned weight.

    Args:
        name: qualified name of the parameter; of one matrix of a stack, with its index: `experts.down_proj[3]`.
        shape: (fan_out, fan_in), the column of its bias included.
        block: its curvature method.
        modules: the modules whose calls use it.
        adapter: how they store it.
        damping: rule, strength and width multipliers.
        device: where the statistics live.
        dtype: float32, or float64 for a float64 weight.
        bias: the parameter that is the last column of the matrix.
        head: of a tied weight, the modules that use it as an output head; `modules` are its embeddings.
        is_head: whether it is the output head, and nothing else.
        owner: the rank that refreshes its preconditioner.
        owned: whether that is this one.
        held: whether this rank has its statistics and its preconditioner, and preconditions its gradient.
        state: the block's tensors, and those of norm control and momentum on the ranks that hold the layer. On the
            others they are on the meta device, for their shapes; only what the block's `observed` names is there too.
        updates: how often its statistics have been updated.
        refreshes: how many preconditioners have been built; until the first, the weight is in the fallback.
        failures: how many refreshes in a row have failed.
        steps: how many second-order updates its weight has had.
        overflows: how many of them were left at zero because the preconditioned gradient was not finite, or linear
            algebra failed in the norm control; counted where the layer is held.
        momentum: the decay of its average of gradients at this step, as its parameter group has it.
        rotated: this step's gradient in the coordinates of its block, as long as they are those of the preconditioner.
        is_idle: whether no token has reached it in this step: one of a stack, whose gradient is zero. It rests then,
            statistics, momentum and weight decay included.
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
    owner: int = 0
    owned: bool = True
    held: bool = True
    state: State = field(default_factory=dict)
    updates: int = 0
    refreshes: int = 0
    failures: int = 0
    steps: int = 0
    overflows: int | Tensor = 0
    rotated: Tensor | None = None
    momentum: float = 0.0
    is_idle: bool = False

    @property
    def parameter(self) -> str:
        """The name of the weight that it is, or is a matrix of."""
        return self.name if self.adapter.index is None else self.name.rpartition("[")[0]

    @cached_property
    def rotating(self) -> RotatingBlock | None:
        """The block, where it keeps the momentum in coordinates of its own. Asking for a protocol takes its time."""
        return self.block if isinstance(self.block, RotatingBlock) and self.block.keeps_momentum else None

    @property
    def building(self) -> bool:
        """Whether the block still builds what its first update needs (SOAP's first basis): nothing moves until then."""
        return self.updates <= self.block.building_steps

    @property
    def nbytes(self) -> int:
        """Of its gradient, in the dtype of the statistics."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blank_state(self) -> State:
        """The block's tensors before the first update, as far as this rank has them."""
        if self.held:
            return self.block.init_state(self.shape, self.device, self.dtype)
        shapes = self.block.init_state(self.shape, torch.device("meta"), self.dtype)
        return shapes | {name: torch.zeros_like(shapes[name], device=self.device) for name in self.block.observed}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take copies of what this rank needs of a complete state.

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
        """Go with a model that was moved or cast after its optimizer had been built.

        Args:
            dtype: of the statistics, see `statistics_dtype`.
        """
        if (self.device, self.dtype) != (device, dtype):
            self.device, self.dtype = device, dtype
            self.state = {n: t.to(dtype) if t.is_meta else t.to(device, dtype) for n, t in self.state.items()}


def statistics_dtype(weight: torch.dtype) -> torch.dtype:
    """Of a weight in this one: float32, or float64."""
    return torch.float64 if weight == torch.float64 else torch.float32
