"""Steps that are left out because a gradient is not finite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.distributed import is_sharded, local, true_on_all_ranks
from hf_so2.errors import TrainingDivergedError

logger = logging.getLogger(__name__)

# A few overflows are part of low-precision training; this many in a row mean that it has diverged.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class SkippedSteps:
    """How many there were in all, and how many since the last step that was made."""

    total: int = 0
    in_a_row: int = 0

    def add(self, step: int) -> None:
        """Count one more in place of step number `step`.

        Raises:
            TrainingDivergedError: `MAX_SKIPPED_IN_A_ROW` in a row.
        """
        self.total += 1
        self.in_a_row += 1
        logger.warning("a gradient is not finite: the step is skipped (%d so far)", self.total)
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"gradients were not finite {self.in_a_row} steps in a row, from step {step} on;"
                " lower the learning rate or resume from an earlier checkpoint"
            )


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether every entry of every gradient is finite; one transfer to the host. With sharded ones a collective."""
    # An empty tensor has no maximum.
    parts = [part for part in map(local, gradients) if part.numel()]
    # Extremes pass on a NaN and cannot overflow where the gradients themselves have not.
    extremes = [x.to(gradients[0].device, torch.float64) for part in parts for x in torch.aminmax(part)]
    finite = torch.isfinite(torch.stack(extremes)).all() if extremes else torch.tensor(True)
    if any(map(is_sharded, gradients)):
        return true_on_all_ranks(finite.to(gradients[0].device))
    return bool(finite)
