"""Capture for the Fisher matrix of the model's own predictions: output gradients of a loss with sampled labels.

The forward pass only keeps notes: each layer's input and the place of its output in the graph. One call of
`torch.autograd.grad` at those places then gives every `δ` of the sampled loss. It reaches no parameter, so neither
gradients nor the reducer of `DistributedDataParallel` notice, and the graph stays for the training loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.module_tracker import ModuleTracker

from hf_so2.errors import ConfigurationError
from hf_so2.layers.adapters import Adapter
from hf_so2.layers.capture import Capture, LayerSums

Note = tuple[str, Adapter, Tensor, GradientEdge]

REENTRANT = "cannot be used with reentrant gradient checkpointing; pass use_reentrant=False"
FORGOTTEN = "needs a call of the optimizer's sample_fisher(logits) between every forward pass and its backward"


class SampledCapture(Capture):
    """As `Capture`, fed by `differentiate` instead of the backward pass of the training loss."""

    _notes: list[Note]
    _noted: set[str]
    _sampled: bool

    def differentiate(self, loss: Tensor) -> None:
        """Add the statistics of `loss`, the sum of the losses of single tokens, to this step's.

        Raises:
            ConfigurationError: the layers are under reentrant checkpointing, which hides their outputs.
        """
        notes, self._notes, self._sampled = self._notes, [], True
        edges = [edge for *_, edge in notes]
        for (name, adapter, inputs, _), gradient in zip(notes, self._gradients(loss, edges), strict=True):
            if gradient is not None:
                self._observe(name, adapter, inputs, gradient)

    @staticmethod
    def _gradients(loss: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        if not edges:
            raise ConfigurationError("fisher", "mc", REENTRANT)
        try:
            return torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ConfigurationError("fisher", "mc", REENTRANT) from None
            raise

    def take(self) -> tuple[dict[str, LayerSums], int | Tensor | None]:
        """As in `Capture`.

        Raises:
            ConfigurationError: forward passes were made, and nobody called `differentiate`.
        """
        if self._notes and not self._sampled:
            raise ConfigurationError("fisher", "mc", FORGOTTEN)
        return super().take()

    def discard(self) -> None:
        super().discard()
        self._notes, self._noted, self._sampled = [], set(), False

    def _watch(self, name: str, adapter: Adapter, inputs: Tensor, output: Tensor) -> None:
        # A layer that runs during a backward pass is being recomputed for checkpointing, and has been noted before.
        if not ModuleTracker().is_bw:
            self._notes.append((name, adapter, inputs, get_gradient_edge(output)))
            self._noted.add(name)
        elif name not in self._noted:
            raise ConfigurationError("fisher", "mc", REENTRANT)
