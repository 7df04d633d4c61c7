"""Hooks that hand every layer's inputs `h` and output gradients `δ` to its curvature block.

A forward hook registers a hook on the *output tensor*; both factors are summed when that tensor's gradient arrives.
This is exact for a layer called twice, for shared weights and for both modes of gradient checkpointing: whatever is
recomputed, each gradient arrives once.

Layers that read the same tensor (queries, keys and values; a gated MLP's two halves) get their gradients one after the
other, so what depends on the inputs alone is summed for the first of them and copied for the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_so2.layers.adapters import Adapter
from hf_so2.layers.hooks import ForwardHook
from hf_so2.layers.rows import WEIGHT_SHARING, InputRows
from hf_so2.layers.sketch import Fold, fold_of_sequences

Sums = dict[str, Tensor]
Observe = Callable[[Tensor, Tensor, Sums, Fold | None], Sums]


@dataclass
class LayerSums:
    """Sums over the rows that one weight has seen since they were last taken, how many rows those were, and from how
    many positions of sequences.
    """

    sums: Sums = field(default_factory=dict)
    rows: int | Tensor = 0
    positions: int | Tensor = 0

    def add(self, sums: Sums, rows: InputRows) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value
        self.rows, self.positions = self.rows + rows.count, self.positions + rows.positions


@dataclass
class _Inputs:
    """The inputs that the last layer read: as it was given them, as rows, how rows are folded, and their sums by
    themselves.
    """

    given: Tensor
    version: int
    mask: Tensor | None
    adapter: Adapter
    rows: InputRows
    fold: Fold | None
    sums: Sums = field(default_factory=dict)

    def are(self, given: Tensor, mask: Tensor | None, adapter: Adapter, dtype: torch.dtype) -> bool:
        """Whether another layer was given the same values: the same memory (`given` keeps it from being used anew),
        seen the same way and not written to since.
        """
        return (
            (given.data_ptr(), given.shape, given.stride(), given.dtype, given.device)
            == (self.given.data_ptr(), self.given.shape, self.given.stride(), self.given.dtype, self.given.device)
            and given._version == self.version
            and mask is self.mask
            and adapter == self.adapter
            and dtype == self.rows.h.dtype
        )


class Capture:
    """Sums the statistics of all layers over the micro-batches of one optimizer step.

    Args:
        layers: for every weight, by qualified name: the modules that use it and its adapter.
        observers: for every weight: maps rows `h` (rows, fan_in) and `δ` (rows, fan_out) to the block's sums, given
            those of them that are known already and how rows are folded.
        of_inputs: for every weight: the names of the sums that depend on `h` alone.
        dtypes: for every weight: the dtype of its statistics; low-precision activations are cast before the products.
        weight_sharing: a key of `hf_so2.layers.rows.WEIGHT_SHARING`.
        sketch: how many tokens of a sequence are folded into one, see `hf_so2.layers.sketch`; 1 leaves all.

    Attributes:
        due: the names of the weights whose layers the next forward pass captures. Others pay a look-up per call.
        step: number of the step that they are captured for; sketches of different steps have different signs.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[Sequence[nn.Module], Adapter]],
        observers: Mapping[str, Observe],
        of_inputs: Mapping[str, Collection[str]],
        dtypes: Mapping[str, torch.dtype],
        weight_sharing: str = "expand",
        sketch: int = 1,
    ) -> None:
        self.due: Collection[str] = frozenset()
        self.step = 0
        self._observers, self._of_inputs, self._dtypes = observers, of_inputs, dtypes
        self._weight_sharing, self._sketch = WEIGHT_SHARING[weight_sharing], sketch
        self._last_inputs: _Inputs | None = None
        self._handles: list[RemovableHandle] = []
        for name, (modules, adapter) in layers.items():
            for module in modules:
                hook = ForwardHook(self, name, adapter)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._sums: dict[str, LayerSums]
        self._tokens: int | Tensor | None
        self._gradient_scale: float | Tensor | None
        self._row_mask: Tensor | None
        self.discard()

    def announce(self, tokens: int | Tensor, gradient_scale: float | Tensor, row_mask: Tensor | None = None) -> None:
        """What the caller knows of the next micro-batch; see `SecondOrderOptimizer.announce`."""
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        self._gradient_scale, self._row_mask = gradient_scale, row_mask

    def take(self) -> tuple[dict[str, LayerSums], int | Tensor | None]:
        """Hand out the sums of all layers and the announced tokens (None if nobody announced any), and start afresh."""
        taken = self._sums, self._tokens
        self.discard()
        return taken

    def discard(self) -> None:
        """Forget whatever was captured and announced since the last step, as after a step that was given up."""
        self._sums = {}
        self._last_inputs = None
        self._tokens = self._gradient_scale = self._row_mask = None

    def remove(self) -> None:
        """Detach from the model."""
        _remove(self._handles)

    def called(self, name: str, adapter: Adapter, inputs: Tensor, output: Tensor) -> None:
        """Capture a call of a module that uses the weight `name`, as soon as the gradient of its output arrives."""
        if name in self.due and torch.is_grad_enabled() and output.requires_grad:
            self._watch(name, adapter, inputs.detach(), output)

    def _watch(self, name: str, adapter: Adapter, inputs: Tensor, output: Tensor) -> None:
        output.register_hook(lambda gradient: self._observe(name, adapter, inputs, gradient))

    @torch.no_grad()
    def _observe(self, name: str, adapter: Adapter, inputs: Tensor, gradient: Tensor) -> None:
        seen = self._seen(adapter, inputs, self._dtypes[name])
        delta = self._weight_sharing.gradients(adapter, gradient.to(self._dtypes[name]), seen.rows)
        if self._gradient_scale is not None:
            delta = delta / self._gradient_scale
        # Copies: a layer adds the sums of later micro-batches into what it was handed.
        known = {key: seen.sums[key].clone() for key in self._of_inputs[name] if key in seen.sums}
        # Checkpointing may run a layer inside another micro-batch's autocast region.
        with torch.autocast(delta.device.type, enabled=False):
            sums = self._observers[name](seen.rows.h, delta, known, seen.fold)
        self._sums.setdefault(name, LayerSums()).add(sums, seen.rows)
        seen.sums.update({key: sums[key] for key in self._of_inputs[name]})

    def _seen(self, adapter: Adapter, inputs: Tensor, dtype: torch.dtype) -> _Inputs:
        """The rows of a layer's inputs: those of the layer before, if it read the same tensor."""
        mask = self._row_mask
        if self._last_inputs is None or not self._last_inputs.are(inputs, mask, adapter, dtype):
            rows = self._weight_sharing.inputs(adapter, inputs if adapter.one_hot else inputs.to(dtype), mask)
            positions = inputs.shape if adapter.one_hot else inputs.shape[:-1]
            fold = fold_of_sequences(positions, self._sketch, self.step, inputs.device) if self._sketch > 1 else None
            self._last_inputs = _Inputs(inputs, inputs._version, mask, adapter, rows, fold)
        return self._last_inputs


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
