"""The values for a log that only the step itself knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_so2.engine.preconditioned import LayerUpdate, over_parts


@dataclass
class StepRecord:
    """The values for a log that only the step itself knows.

    Attributes:
        enabled: whether the coming step is recorded.
        step: number of the recorded step.
        update_rms: by layer, the root mean square of the entries of its change without weight decay, 0-dim.
        norm_factor: the factor by which a norm control of the whole model changed the length of all updates, 0-dim.
    """

    enabled: bool = False
    step: int = 0
    update_rms: dict[str, Tensor] = field(default_factory=dict)
    norm_factor: Tensor | None = None
    _length: Tensor | None = None

    def before_norm_control(self, updates: Sequence[LayerUpdate]) -> None:
        """Record the length of all updates before a norm control of the whole model."""
        if self.enabled and updates:
            self._length = _total_length(updates)

    def after_norm_control(self, updates: Sequence[LayerUpdate], step: int) -> None:
        """Record the updates that are about to be applied, and end the recording."""
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
    """The Frobenius norm of every update. A collective if updates are sharded."""
    if not updates:
        return torch.zeros(0)
    device = updates[0].update.device
    lengths = torch.stack([torch.linalg.vector_norm(u.update).to(device, torch.float64) for u in updates])
    return over_parts(updates, lengths.square()).sqrt()


def _total_length(updates: Sequence[LayerUpdate]) -> Tensor:
    return torch.linalg.vector_norm(_lengths(updates))
