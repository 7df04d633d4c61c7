"""Hooks that pass every layer's inputs `h` and output gradients `δ` to its curvature block.

A forward hook registers a hook on the *output tensor*. Both factors are summed when the gradient of this tensor
arrives, if the same backward pass also adds to the gradient of the weight. This is exact for a layer that is called
twice, for shared weights, and for both modes of gradient checkpointing: each gradient arrives once, whatever is
recomputed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from hf_so2.errors import ConfigurationError
from hf_so2.layers.backward import (
    Announcement,
    Backward,
    accumulator_of,
    current_task,
    decoder_of,
    heads_of,
    hidden_in,
    in_transform,
    predictions_in,
    tell_of_gradient,
    will_run,
    written_to,
)
from hf_so2.layers.hooks import Hook
from hf_so2.layers.rows import WEIGHT_SHARING, live_rows
from hf_so2.layers.sums import Call, Captured, Readers, Source, Summation

logger = logging.getLogger(__name__)

PACKED = (
    "takes a row of a batch for one sequence, but position_ids begin anew inside a row (packed documents); use expand"
)
SEVERAL_LOSSES = (
    "%s: a second backward pass has come through one forward pass. Its gradients count as rows of their own in the"
    " curvature statistics; add the losses up before backward() to have them counted as one."
)


class GradientWatch(Protocol):
    """An object that knows the parameters."""

    def gradients_are_gone(self) -> bool: ...


class Capture:
    """Sums the statistics of all layers over the micro-batches of one optimizer step.

    Args:
        model: the model that is called to make predictions.
        sources: how the statistics of each weight are taken, by qualified name.
        weight_sharing: a key of `hf_so2.layers.rows.WEIGHT_SHARING`.
        sketch: number of tokens of a sequence that are folded into one, see `hf_so2.layers.plan`; 1 keeps all, None
            as many as the dimension of the factor needs.

    Attributes:
        due: names of the weights whose layers the next forward pass captures. All others cost one look-up per call.
        summation: computes the sums from the captured tensors.
        watch: tells whether all gradients were reset without a call of the optimizer. It is a weak reference, since
            hooks in a graph keep the capture alive.
    """

    def __init__(
        self, model: nn.Module, sources: Mapping[str, Source], weight_sharing: str = "expand", sketch: int | None = 1
    ) -> None:
        self.due: Collection[str] = frozenset()
        self.watch: Callable[[], GradientWatch | None] = lambda: None
        self._is_reduced = weight_sharing == "reduce"
        self.summation = Summation(sources, WEIGHT_SHARING[weight_sharing], sketch)
        self._has_warned = False
        self._handles: list[RemovableHandle] = []
        # Predictions first: if a layer's output is the prediction, its gradient is then counted before it is used.
        heads = heads_of(model)
        self._counts_in_heads = bool(heads)
        for head in heads:
            self._watch(head, "predicted")
        # A fused loss (TRL's, Liger's) multiplies by the head's weight and does not call the head.
        self._head_calls = 0
        if heads and (decoder := decoder_of(model)) is not None:
            self._watch(decoder, "decoded")
        self._handles.append(model.register_forward_pre_hook(Hook(self, "begins"), with_kwargs=True))
        self._watch(model, "returned")
        for name, source in sources.items():
            for module in source.modules:
                self._watch(module, "called", name)
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._captured: Captured
        self._aside: Captured
        self._backward: Backward | None
        self._announced: Announcement | None
        self.discard()

    def _watch(self, module: nn.Module, event: str, *about: str) -> None:
        # Runs before other hooks, which may replace the output of the module.
        self._handles.append(module.register_forward_hook(Hook(self, event, *about), with_kwargs=True, prepend=True))

    # Called by the training loop.

    def announce(self, tokens: int | Tensor | None, gradient_scale: float | Tensor, *, is_mean: bool = False) -> None:
        """Take what the caller knows about the next micro-batch; see `SecondOrderOptimizer.announce`."""
        self._announced = Announcement(tokens, gradient_scale, is_mean)

    def take(self, *, by_hand: bool = True) -> Captured:
        """Return what was captured since the last step, and start again from nothing.

        Args:
            by_hand: whether to return the captures that were set aside if there are no others: the caller has then
                restored the gradients of those backward passes by hand.
        """
        self._finish()
        taken = self._aside if by_hand and not self._captured.layers else self._captured
        self.discard()
        return taken

    def discard(self) -> None:
        """Discard everything captured and announced since the last step, as after a step that was given up."""
        self._captured, self._aside = Captured(), Captured()
        self.summation.waiting = self._backward = self._announced = None

    def drop(self) -> bool:
        """Set aside the backward passes since the last step, when their gradients are reset.

        A forward pass whose backward pass is still to come stays, with its announcement.

        Returns:
            Whether there was any backward pass.
        """
        found = bool(self._captured.layers)
        self._set_aside()
        self.summation.waiting = self._backward = None
        if self._announced is not None and not self._announced.is_new:
            self._announced = None
        return found

    def remove(self) -> None:
        """Detach from the model."""
        _remove(self._handles)

    # Called by the hooks, in the order of a step.

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass of the model begins."""
        self._forget_if_gone()
        positions = kwargs.get("position_ids")
        if not self._is_reduced or not self.due or not isinstance(positions, Tensor):
            return
        if torch.is_grad_enabled() and positions.ndim == 2 and bool(((positions == 0).sum(dim=1) > 1).any()):
            raise ConfigurationError("weight_sharing", "reduce", PACKED)

    def called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """A module that uses the weight `name` has been called."""
        if name not in self.due or not torch.is_grad_enabled() or not out.requires_grad:
            return
        accumulator = accumulator_of(module.weight)  # type: ignore[arg-type]
        if accumulator is not None:
            # The module has one input, given by position or by name.
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._await(Call(name, inputs.detach(), accumulator), out)

    def predicted(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """The model's head has been called."""
        self._head_calls += 1
        self._count(predictions_in(out))

    def decoded(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """The head's input has been computed. Its rows are counted if no head is called before its gradient arrives.

        A loss through the head's weight gives a row without a label a gradient of zero, as the head itself would.
        """
        calls = self._head_calls
        self._tell(hidden_in(out), lambda gradient: self._reached(gradient if self._head_calls == calls else None))

    def returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """A forward pass of the model has ended."""
        if not self._counts_in_heads:
            self._count(predictions_in(out))

    def _await(self, call: Call, output: Tensor) -> None:
        written_to(output).register_hook(lambda gradient: self._arrived(call, gradient))

    def _count(self, predictions: Tensor | None) -> None:
        self._tell(predictions, self._reached)

    def _tell(self, table: Tensor | None, tell: Callable[[Tensor | None], None]) -> None:
        if table is None or not table.requires_grad or not self.due or in_transform():
            return
        if torch.is_grad_enabled():
            tell_of_gradient(table, tell)

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
        trains = will_run(call.accumulator)
        if trains is False:
            return
        if self._backward is None:
            self._open()
        assert self._backward is not None
        if trains and not self._backward.trains:
            self._begin(self._backward)
        if call.arrived and not self._has_warned:
            self._has_warned = True
            logger.warning(SEVERAL_LOSSES, call.name)
        call.arrived = True
        self._collect(call, gradient, self._backward)

    def _open(self) -> None:
        # Once gradients of weights have been added in this pass, nobody can tell.
        self._forget_if_gone()
        self.summation.waiting = None  # left over if an exception ended the last backward pass
        self._backward = Backward(current_task(), self._announced)
        Variable._execution_engine.queue_callback(self._close)

    def _begin(self, backward: Backward) -> None:
        """The first gradient of a backward pass that trains."""
        backward.trains = True
        announced = backward.announced
        if announced is not None and announced.is_new:
            announced.is_new = False
            self._captured.add(Captured(tokens=announced.tokens))

    def _forget_if_gone(self) -> None:
        watch = self.watch()
        if self._captured.layers and watch is not None and watch.gradients_are_gone():
            self._set_aside()

    def _set_aside(self) -> None:
        """Keep the captures for a step that finds no others.

        A caller may keep gradients and restore them after a reset, or get them from `torch.autograd.grad`.
        """
        self._aside.add(self._captured)
        self._captured = Captured()

    def _close(self) -> None:
        """A backward pass has ended."""
        self._finish()
        backward, self._backward = self._backward, None
        if backward is not None:
            said = backward.announced is not None and backward.announced.tokens is not None
            target = self._captured if backward.trains else self._aside
            target.add(Captured(tokens=None if said else backward.loss_rows))

    def _collect(self, call: Call, gradient: Tensor, backward: Backward) -> None:
        if (done := self.summation.collect(call, gradient, backward)) is not None:
            self._sum(done)

    def _finish(self) -> None:
        waiting, self.summation.waiting = self.summation.waiting, None
        if waiting is not None:
            self._sum(waiting)

    def _sum(self, readers: Readers) -> None:
        self.summation.sum(readers, self._captured if readers.backward.trains else self._aside)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
