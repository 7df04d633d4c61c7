"""Hooks that hand every layer's inputs `h` and output gradients `δ` to its curvature block.

A forward hook registers a hook on the *output tensor*; both factors are summed when that tensor's gradient arrives, if
the same backward pass also adds to the gradient of the weight. This is exact for a layer called twice, for shared
weights and for both modes of gradient checkpointing: whatever is recomputed, each gradient arrives once.

Layers that read the same tensor (queries, keys and values; a gated MLP's two halves) get their gradients one after the
other. They are summed together: which rows count, and what depends on the inputs alone, is found once for all of them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from hf_so2.errors import ConfigurationError
from hf_so2.layers.adapters import Adapter
from hf_so2.layers.backward import (
    Announcement,
    Backward,
    accumulator_of,
    current_task,
    edge_of_predictions,
    heads_of,
    in_transform,
    predictions_in,
    will_run,
)
from hf_so2.layers.hooks import Hook
from hf_so2.layers.rows import WEIGHT_SHARING, InputRows, live_rows
from hf_so2.layers.sketch import Fold, fold_of_sequences

logger = logging.getLogger(__name__)

Sums = dict[str, Tensor]
Observe = Callable[[Tensor, Tensor, Sums, Fold | None], Sums]

PACKED = (
    "takes a row of a batch for one sequence, but position_ids begin anew inside a row (packed documents); use expand"
)
SEVERAL_LOSSES = (
    "%s: a second backward pass has come through one forward pass. Its gradients count as rows of their own in the"
    " curvature statistics; add the losses up before backward() to have them counted as one."
)


class GradientWatch(Protocol):
    """Who knows the parameters."""

    def gradients_are_gone(self) -> bool: ...


@dataclass(frozen=True)
class Source:
    """How the statistics of one weight are taken.

    Args:
        modules: those that use it in the same way.
        adapter: how they store it.
        observe: maps rows `h` (rows, fan_in) and `δ` (rows, fan_out) to the block's sums, given those of them that are
            known already and how rows are folded.
        degrees: of every sum: how often `δ` enters as a factor. Those of degree 0 depend on `h` alone.
        dtype: of the statistics, as it stands; low-precision activations are cast before the products.
    """

    modules: Sequence[nn.Module]
    adapter: Adapter
    observe: Observe
    degrees: Mapping[str, int]
    dtype: Callable[[], torch.dtype]


@dataclass
class LayerSums:
    """Sums over the rows that one weight has seen since they were last taken, how many rows those were, and from how
    many positions of sequences.
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
    """What one optimizer step has seen.

    Args:
        layers: the sums, by the name of the weight.
        tokens: how many rows had a loss; None where nobody has said and none were met.
        is_scaled: whether the factor that backward puts on gradients has been undone.
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
        name: of the weight.
        inputs: what it was given, detached.
        accumulator: adds to the weight's gradient.
        arrived: whether the gradient of its output has.
    """

    name: str
    inputs: Tensor
    accumulator: Node
    arrived: bool = False


@dataclass
class _Readers:
    """Layers that read the same tensor, with the gradients of their outputs."""

    given: Tensor
    version: int
    adapter: Adapter
    dtype: torch.dtype
    backward: Backward
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def include(self, call: Call, adapter: Adapter, dtype: torch.dtype, backward: Backward) -> bool:
        """Whether a layer was given the same values: the same memory (`given` keeps it from being used anew), seen the
        same way and not written to since.
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


class Capture:
    """Sums the statistics of all layers over the micro-batches of one optimizer step.

    Args:
        model: what is called to make predictions.
        sources: how the statistics of each weight are taken, by qualified name.
        weight_sharing: a key of `hf_so2.layers.rows.WEIGHT_SHARING`.
        sketch: how many tokens of a sequence are folded into one, see `hf_so2.layers.sketch`; 1 leaves all.

    Attributes:
        due: the names of the weights whose layers the next forward pass captures. Others pay a look-up per call.
        step: number of the step that they are captured for; sketches of different steps have different signs.
        watch: tells whether all gradients have been reset behind the optimizer's back; a weak reference, since hooks
            in a graph keep the capture alive.
    """

    def __init__(
        self, model: nn.Module, sources: Mapping[str, Source], weight_sharing: str = "expand", sketch: int = 1
    ) -> None:
        self.due: Collection[str] = frozenset()
        self.step = 0
        self.watch: Callable[[], GradientWatch | None] = lambda: None
        self._sources = sources
        self._weight_sharing, self._sketch = WEIGHT_SHARING[weight_sharing], sketch
        self._has_warned = False
        self._handles: list[RemovableHandle] = []
        # Predictions first: where a layer's output is the prediction, its gradient is then counted before it is used.
        heads = heads_of(model)
        self._counts_in_heads = bool(heads)
        for head in heads:
            self._watch(head, "predicted")
        self._handles.append(model.register_forward_pre_hook(Hook(self, "begins"), with_kwargs=True))
        self._watch(model, "returned")
        for name, source in sources.items():
            for module in source.modules:
                self._watch(module, "called", name)
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._captured: Captured
        self._readers: _Readers | None
        self._backward: Backward | None
        self._announced: Announcement | None
        self.discard()

    def _watch(self, module: nn.Module, event: str, *about: str) -> None:
        self._handles.append(module.register_forward_hook(Hook(self, event, *about), with_kwargs=True))

    # What a caller says.

    def announce(self, tokens: int | Tensor | None, gradient_scale: float | Tensor, *, is_mean: bool = False) -> None:
        """What the caller knows of the next micro-batch; see `SecondOrderOptimizer.announce`."""
        self._announced = Announcement(tokens, gradient_scale, is_mean)

    def take(self) -> Captured:
        """Hand out what was captured since the last step, and start afresh."""
        self._sum_readers()
        taken = self._captured
        self.discard()
        return taken

    def discard(self) -> None:
        """Forget whatever was captured and announced since the last step, as after a step that was given up."""
        self._captured = Captured()
        self._readers = self._backward = self._announced = None

    def drop(self) -> bool:
        """Forget the backward passes since the last step, as their gradients are; whether there was any.

        A forward pass whose backward pass is still to come, and what was announced of it, stay.
        """
        found = bool(self._captured.layers)
        self._captured, self._readers = Captured(), None
        if self._announced is not None and not self._announced.is_new:
            self._announced = None
        return found

    def remove(self) -> None:
        """Detach from the model."""
        _remove(self._handles)

    # What hooks tell, in the order of a step.

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass of the model begins."""
        positions = kwargs.get("position_ids")
        if self._weight_sharing is not WEIGHT_SHARING["reduce"] or not self.due or not isinstance(positions, Tensor):
            return
        if torch.is_grad_enabled() and positions.ndim == 2 and bool(((positions == 0).sum(dim=1) > 1).any()):
            raise ConfigurationError("weight_sharing", "reduce", PACKED)

    def called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """A module that uses the weight `name` has been called."""
        if name not in self.due or not torch.is_grad_enabled() or not out.requires_grad:
            return
        accumulator = accumulator_of(module.weight)  # type: ignore[arg-type]
        if accumulator is not None:
            # Of one input, by position or by whatever name the module has for it.
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._await(Call(name, inputs.detach(), accumulator), out)

    def predicted(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """The model's head has been called."""
        self._count(predictions_in(out))

    def returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """A forward pass of the model has ended."""
        if not self._counts_in_heads:
            self._count(predictions_in(out))

    def _await(self, call: Call, output: Tensor) -> None:
        output.register_hook(lambda gradient: self._arrived(call, gradient))

    def _count(self, predictions: Tensor | None) -> None:
        if predictions is None or not predictions.requires_grad or not self.due or in_transform():
            return
        if torch.is_grad_enabled():
            edge = edge_of_predictions(predictions)
            edge.node.register_prehook(lambda gradients: self._reached(gradients[edge.output_nr]))

    @torch.no_grad()
    def _reached(self, gradient: Tensor | None) -> None:
        """The gradient of the model's predictions has arrived."""
        if gradient is None:
            return
        if self._backward is None or self._backward.task != current_task():
            self._open()
        assert self._backward is not None
        rows = live_rows([gradient]).sum()
        self._backward.loss_rows = rows if self._backward.loss_rows is None else self._backward.loss_rows + rows

    def _arrived(self, call: Call, gradient: Tensor) -> None:
        """The gradient of a layer's output has arrived."""
        if not will_run(call.accumulator):
            return
        if self._backward is None:
            self._open()
        assert self._backward is not None
        if not self._backward.trains:
            self._begin(self._backward)
        if call.arrived and not self._has_warned:
            self._has_warned = True
            logger.warning(SEVERAL_LOSSES, call.name)
        call.arrived = True
        self._collect(call, gradient, self._backward)

    def _open(self) -> None:
        self._readers = None  # left over where an exception ended the backward pass before
        self._backward = Backward(current_task(), self._announced)
        Variable._execution_engine.queue_callback(self._close)

    def _begin(self, backward: Backward) -> None:
        """The first gradient of a backward pass that trains."""
        backward.trains = True
        self._forget_if_gone()
        announced = backward.announced
        if announced is not None and announced.is_new:
            announced.is_new = False
            self._captured.add(Captured(tokens=announced.tokens))

    def _forget_if_gone(self) -> None:
        watch = self.watch()
        if self._captured.layers and watch is not None and watch.gradients_are_gone():
            self._captured = Captured()

    def _close(self) -> None:
        """A backward pass has ended."""
        self._sum_readers()
        backward, self._backward = self._backward, None
        if backward is not None and backward.trains:
            said = backward.announced is not None and backward.announced.tokens is not None
            self._captured.add(Captured(tokens=None if said else backward.loss_rows))

    # From gradients to sums.

    def _collect(self, call: Call, gradient: Tensor, backward: Backward) -> None:
        source = self._sources[call.name]
        dtype = source.dtype()
        if self._readers is None or not self._readers.include(call, source.adapter, dtype, backward):
            self._sum_readers()
            self._readers = _Readers(call.inputs, call.inputs._version, source.adapter, dtype, backward)
        self._readers.gradients[call.name] = gradient.detach()

    @torch.no_grad()
    def _sum_readers(self) -> None:
        """Sum the statistics of the layers whose gradients have been collected."""
        readers, self._readers = self._readers, None
        if readers is None:
            return
        rows, fold = self._rows_of(readers)
        scale = readers.backward.scale(rows.positions)
        shared: Sums = {}
        # Checkpointing may run a layer inside another micro-batch's autocast region.
        with torch.autocast(readers.given.device.type, enabled=False):
            for name, gradient in readers.gradients.items():
                source = self._sources[name]
                delta = self._weight_sharing.gradients(readers.adapter, gradient.to(readers.dtype), rows)
                # Copies: a layer adds the sums of later micro-batches into what it was handed.
                known = {key: shared[key].clone() for key in source.degrees if key in shared}
                sums = source.observe(rows.h, delta, known, fold)
                shared |= {key: sums[key] for key, degree in source.degrees.items() if not degree}
                self._add(name, sums, rows, scale)

    def _rows_of(self, readers: _Readers) -> tuple[InputRows, Fold | None]:
        given, adapter = readers.given, readers.adapter
        live = live_rows(list(readers.gradients.values()))
        rows = self._weight_sharing.inputs(adapter, given, readers.dtype, live)
        positions = given.shape if adapter.one_hot else given.shape[:-1]
        fold = fold_of_sequences(positions, self._sketch, self.step, given.device) if self._sketch > 1 else None
        return rows, fold

    def _add(self, name: str, sums: Sums, rows: InputRows, scale: Tensor | None) -> None:
        if scale is not None:
            for key, degree in self._sources[name].degrees.items():
                if degree:
                    sums[key].mul_(scale.to(sums[key].device) ** -degree)
            self._captured.is_scaled = True
        self._captured.layers.setdefault(name, LayerSums()).add(sums, rows.count, rows.positions)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
