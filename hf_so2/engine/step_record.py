"""What only a step itself can tell a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_so2.engine.preconditioned import LayerUpdate, over_parts


@dataclass
class StepRecord:
    """What only the step itself can tell.

    Attributes:
        enabled: whether the coming step is recorded.
        step: number of the recorded step.
        update_rms: by layer, the root mean square of the entries of its change, weight decay aside, 0-dim.
        norm_factor: by what a norm control of the whole model multiplied the length of all updates, 0-dim.
    """

    enabled: bool = False
    step: int = 0
    update_rms: dict[str, Tensor] = field(default_factory=dict)
    norm_factor: Tensor | None = None
    _length: Tensor | None = None

    def before_norm_control(self, updates: Sequence[LayerUpdate]) -> None:
        """Take the length of all updates before a norm control of the whole model."""
        if self.enabled and updates:
            self._length = _total_length(updates)

    def after_norm_control(self, updates: Sequence[LayerUpdate], step: int) -> None:
        """Take what is about to be applied; recording ends with it."""
        if not self.enabled:
            return
        self.enabled, self.step = False, step
        self.update_rms = {
            u.layer.name: u.group["lr"] * norm / math.sqrt(math.prod(u.layer.shape))
            for u, norm in zip(updates, _lengths(updates), strict=True)
        }
        self.norm_factor = _total_length(updates) / self._length if self._length is not None else None
        self._length = None


def _lengths(updates: Sequence[LayerUpdate]) -> Tensor:
    """The Frobenius norm of every update; a collective where there are parts of them."""
    if not updates:
        return torch.zeros(0)
    device = updates[0].update.device
    lengths = torch.stack([torch.linalg.vector_norm(u.update).to(device, torch.float64) for u in updates])
    return over_parts(updates, lengths.square()).sqrt()


def _total_length(updates: Sequence[LayerUpdate]) -> Tensor:
    return torch.linalg.vector_norm(_lengths(updates))
