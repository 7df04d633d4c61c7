"""From the inputs and output gradients of layers to the sums of their statistics.

Layers that read the same tensor (queries, keys and values; a gated MLP's two halves) get their gradients one after the
other. Their statistics are summed together. The rows that count, and the sums that depend on the inputs alone, are
computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_so2.layers.adapters import Adapter
from hf_so2.layers.backward import Backward
from hf_so2.layers.plan import RowPlan
from hf_so2.layers.rows import InputRows, WeightSharing, live_rows

Sums = dict[str, Tensor]
Observe = Callable[[Tensor, Tensor, Sums, RowPlan], Sums]


@dataclass(frozen=True)
class Source:
    """How the statistics of one weight are taken.

    Args:
        modules: the modules that use the weight in the same way.
        adapter: how they store the weight.
        observe: maps rows `h` (rows, fan_in) and `δ` (rows, fan_out) to the block's sums. It also takes the sums that
            are already known, and how rows are used.
        degrees: for every sum, how often `δ` enters as a factor. Sums of degree 0 depend on `h` alone.
        dtype: returns the current dtype of the statistics. Low-precision activations are cast before the products.
    """

    modules: Sequence[nn.Module]
    adapter: Adapter
    observe: Observe
    degrees: Mapping[str, int]
    dtype: Callable[[], torch.dtype]


@dataclass
class LayerSums:
    """Sums over the rows that one weight has seen since the sums were last taken.

    Also the number of these rows, and the number of positions of sequences that they come from.
    """

    sums: Sums = field(default_factory=dict)
    rows: int | Tensor = 0
    positions: int | Tensor = 0

    def add(self, sums: Sums, rows: int | Tensor, positions: int | Tensor) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value
        self.rows, self.positions = self.rows + rows, self.positions + positions


@dataclass
class Captured:
    """The captures of one optimizer step.

    Args:
        layers: the sums, by the name of the weight.
        tokens: number of rows that had a loss; None if it was neither announced nor counted.
        is_scaled: whether the factor that backward puts on gradients is already undone.
    """

    layers: dict[str, LayerSums] = field(default_factory=dict)
    tokens: int | Tensor | None = None
    is_scaled: bool = False

    def add(self, other: Captured) -> None:
        for name, more in other.layers.items():
            self.layers.setdefault(name, LayerSums()).add(more.sums, more.rows, more.positions)
        if other.tokens is not None:
            self.tokens = other.tokens if self.tokens is None else self.tokens + other.tokens
        self.is_scaled |= other.is_scaled


@dataclass
class Call:
    """One call of a module that uses a weight.

    Args:
        name: name of the weight.
        inputs: the inputs of the call, detached.
        accumulator: the node that adds to the weight's gradient.
        arrived: whether the gradient of the output has arrived.
    """

    name: str
    inputs: Tensor
    accumulator: Node
    arrived: bool = False


@dataclass
class Readers:
    """Layers that read the same tensor, with the gradients of their outputs."""

    given: Tensor
    version: int
    adapter: Adapter
    dtype: torch.dtype
    backward: Backward
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def include(self, call: Call, adapter: Adapter, dtype: torch.dtype, backward: Backward) -> bool:
        """Whether a layer was given the same values.

        The values are the same if the memory is the same, with the same layout, and was not written to since. `given`
        keeps this memory from being reused.
        """
        given = call.inputs
        return (
            call.name not in self.gradients
            and (given.data_ptr(), given.shape, given.stride(), given.dtype, given.device)
            == (self.given.data_ptr(), self.given.shape, self.given.stride(), self.given.dtype, self.given.device)
            and given._version == self.version
            and adapter == self.adapter
            and dtype == self.dtype
            and backward is self.backward
        )


class Summation:
    """Sums the statistics of layers. Layers that read the same tensor are summed together.

    Args:
        sources: how the statistics of each weight are taken, by qualified name.
        weight_sharing: how positions become rows.
        sketch: number of tokens of a sequence that are folded into one; 1 keeps all, None as many as the dimension of
            the factor needs.

    Attributes:
        step: number of the step. Sketches of different steps have different signs.
        rows: by name of the weight, the rows of its last statistics, over all micro-batches and ranks.
        sources: as given.
        waiting: the layers whose gradients have arrived, but whose sums are not computed yet.
    """

    def __init__(self, sources: Mapping[str, Source], weight_sharing: WeightSharing, sketch: int | None) -> None:
        self.sources, self._weight_sharing, self._sketch = dict(sources), weight_sharing, sketch
        self.step = 0
        self.rows: Mapping[str, int] = {}
        self.waiting: Readers | None = None

    def collect(self, call: Call, gradient: Tensor, backward: Backward) -> Readers | None:
        """Take in the gradient of a layer's output. Returns the layers before it if they read another tensor."""
        source = self.sources[call.name]
        dtype, done = source.dtype(), None
        if self.waiting is None or not self.waiting.include(call, source.adapter, dtype, backward):
            done = self.waiting
            self.waiting = Readers(call.inputs, call.inputs._version, source.adapter, dtype, backward)
        positions = positions_of(call.inputs, source.adapter)
        self.waiting.gradients[call.name] = gradient.detach().reshape(*positions, gradient.shape[-1])
        return done

    @torch.no_grad()
    def sum(self, readers: Readers, into: Captured) -> None:
        """Add the statistics of some layers that read the same tensor."""
        rows, plan = self._rows_of(readers)
        scale = readers.backward.scale(rows.positions)
        shared: Sums = {}
        # Checkpointing may run a layer inside another micro-batch's autocast region.
        with torch.autocast(readers.given.device.type, enabled=False):
            for name, gradient in readers.gradients.items():
                source = self.sources[name]
                delta = self._weight_sharing.gradients(readers.adapter, gradient.to(readers.dtype), rows)
                # Copies: a layer adds the sums of later micro-batches to these tensors in place.
                known = {key: shared[key].clone() for key in source.degrees if key in shared}
                sums = source.observe(rows.h, delta, known, plan)
                shared |= {key: sums[key] for key, degree in source.degrees.items() if not degree}
                if scale is not None:
                    _undo(scale, sums, source.degrees)
                into.layers.setdefault(name, LayerSums()).add(sums, rows.count, rows.positions)
        into.is_scaled |= scale is not None

    def _rows_of(self, readers: Readers) -> tuple[InputRows, RowPlan]:
        given, adapter = readers.given, readers.adapter
        live = live_rows(list(readers.gradients.values()))
        rows = self._weight_sharing.inputs(adapter, given, readers.dtype, live)
        # Layers that read the same tensor share sums: their rows are folded alike.
        seen = min(self.rows.get(name, 0) for name in readers.gradients)
        positions = positions_of(given, adapter)
        shape = positions if positions.numel() == len(rows.live) else None
        return rows, RowPlan(
            rows.live, rows.weights, None if adapter.one_hot else rows.h, shape, self._sketch, seen, self.step
        )


def positions_of(inputs: Tensor, adapter: Adapter) -> torch.Size:
    """The shape of the positions of a layer's inputs."""
    return inputs.shape if adapter.one_hot else inputs.shape[:-1]


def _undo(scale: Tensor, sums: Sums, degrees: Mapping[str, int]) -> None:
    """Divide sums, in place, by the factor that backward has put on gradients, to the power of their degree."""
    for key, degree in degrees.items():
        if degree:
            sums[key].mul_(scale.to(sums[key].device) ** -degree)
