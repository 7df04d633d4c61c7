"""Capture for the Fisher matrix of the model's own predictions: output gradients of a loss with sampled labels.

The forward pass only keeps notes: each layer's input and the place of its output in the graph. One call of
`torch.autograd.grad` at these places then gives every `δ` of the sampled loss. It reaches no parameter. Gradients and
the reducer of `DistributedDataParallel` are therefore not affected, and the graph stays for the training loss.

Notes live as long as their predictions, so an evaluation leaves nothing behind. The sampled statistics count once the
gradient of the training loss has passed through these predictions. If training leaves out a batch, so do the
statistics.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.module_tracker import ModuleTracker

from hf_so2.errors import ConfigurationError
from hf_so2.layers.backward import Backward, edge_of_predictions, logits_in, tell_of_gradient, written_to
from hf_so2.layers.capture import Capture
from hf_so2.layers.rows import live_rows
from hf_so2.layers.sums import Call, Captured

REENTRANT = "cannot be used with reentrant gradient checkpointing; pass use_reentrant=False"
DONATED = "needs torch._functorch.config.donated_buffer = False under torch.compile: it makes two backward passes"
FORGOTTEN = "needs a call of the optimizer's sample_fisher(logits) between every forward pass and its backward"


@dataclass
class _Forward:
    """A forward pass: the notes of its layers, and the sums made from them.

    Args:
        notes: the calls of layers, with the graph edges of their outputs.
        sampled: sums that wait for the training loss.
        returns: whether a hook sees the gradient of the training loss pass through the predictions.
    """

    notes: list[tuple[Call, GradientEdge]] = field(default_factory=list)
    sampled: Captured | None = None
    returns: bool = False


class SampledCapture(Capture):
    """A `Capture` whose gradients come from `differentiate` instead of the backward pass of the training loss."""

    _forward: _Forward
    _pending: list[_Forward]
    _noted: set[str]
    _has_sampled: bool
    _is_busy = False

    def differentiate(self, loss: Tensor) -> None:
        """Add the statistics of `loss`, the sum of the losses of single tokens, to this step's.

        Raises:
            ConfigurationError: the layers are under reentrant checkpointing, which hides their outputs.
        """
        forward, self._forward = self._forward, _Forward()
        notes, self._has_sampled = list(forward.notes), True
        forward.notes.clear()
        with self._busy():
            gradients = self._gradients(loss, [edge for _, edge in notes])
        confirmed, self._captured = self._captured, Captured()
        backward = Backward(-1, self._announced)
        self._begin(backward)
        for (call, _), gradient in zip(notes, gradients, strict=True):
            if gradient is not None:
                self._collect(call, gradient, backward)
        self._finish()
        forward.sampled, self._captured = self._captured, confirmed
        if forward.returns:
            self._pending.append(forward)
        else:
            self._captured.add(forward.sampled)

    def rows_with_loss(self, logits: Tensor, loss: Tensor) -> Tensor | None:
        """Where the gradient of `loss` by `logits` (..., classes) is not zero, (...) of booleans.

        None if `loss` does not depend on `logits`.
        """
        with self._busy():
            (gradient,) = _differentiated(loss, [edge_of_predictions(logits)])
        return None if gradient is None else live_rows([gradient]).reshape(logits.shape[:-1])

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """A context for gradients that do not come from the training loss."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    @staticmethod
    def _gradients(loss: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        if not edges:
            raise ConfigurationError("fisher", "mc", REENTRANT)
        return _differentiated(loss, edges)

    def take(self, *, by_hand: bool = True) -> Captured:
        """As in `Capture`.

        Raises:
            ConfigurationError: there were forward passes, but no call of `differentiate`.
        """
        if self._noted and not self._has_sampled:
            raise ConfigurationError("fisher", "mc", FORGOTTEN)
        if not self._captured.layers:
            # If the loss does not depend on the predictions, no gradient passes through them.
            for forward in self._pending:
                self._captured.add(forward.sampled or Captured())
        return super().take(by_hand=by_hand)

    def discard(self) -> None:
        super().discard()
        self._forward, self._pending, self._noted, self._has_sampled = _Forward(), [], set(), False

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().begins(module, args, kwargs)
        if not ModuleTracker().is_bw:
            self._forward = _Forward()

    def decoded(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Does nothing: labels are drawn from predictions."""

    def returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        logits = logits_in(out)
        if self._forward.notes and isinstance(logits, Tensor):
            weakref.finalize(logits, self._forward.notes.clear).atexit = False
        super().returned(module, args, kwargs, out)

    def _count(self, predictions: Tensor | None) -> None:
        if not self._forward.notes or predictions is None or not predictions.requires_grad:
            return
        self._forward.returns = True
        tell_of_gradient(predictions, partial(self._came_back, self._forward))

    def _came_back(self, forward: _Forward, gradient: Tensor | None) -> None:
        if gradient is None or self._is_busy or forward.sampled is None:
            return
        self._forget_if_gone()
        self._captured.add(forward.sampled)
        forward.sampled = None
        self._pending = [waiting for waiting in self._pending if waiting is not forward]

    def _await(self, call: Call, output: Tensor) -> None:
        # A layer that runs during a backward pass is recomputed for checkpointing. It has a note already.
        if not ModuleTracker().is_bw:
            self._forward.notes.append((call, get_gradient_edge(written_to(output))))
            self._noted.add(call.name)
        elif call.name not in self._noted:
            raise ConfigurationError("fisher", "mc", REENTRANT)


def _differentiated(loss: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    """The gradients of a loss at these edges of its graph; None where it does not depend on one. The graph is kept."""
    try:
        return torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        for sign, allowed in (("use_reentrant", REENTRANT), ("donated", DONATED)):
            if sign in str(error):
                raise ConfigurationError("fisher", "mc", allowed) from None
        raise
