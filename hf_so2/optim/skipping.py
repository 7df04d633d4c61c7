"""Steps that are left out because a gradient is not finite, or would make the state so."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_so2.distributed import is_sharded, local, true_on_all_ranks
from hf_so2.engine.fallback import largest_gradient, of_finite_square
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.engine.statistics import Curvature
from hf_so2.errors import TrainingDivergedError

logger = logging.getLogger(__name__)

# A few overflows are normal in low-precision training. This many in a row mean that training has diverged.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class SkippedSteps:
    """Counts skipped steps: all of them, and those since the last step that was made."""

    total: int = 0
    in_a_row: int = 0

    def add(self, step: int) -> None:
        """Count one more skipped step, at step number `step`.

        Raises:
            TrainingDivergedError: `MAX_SKIPPED_IN_A_ROW` steps in a row were skipped.
        """
        self.total += 1
        self.in_a_row += 1
        logger.warning("a gradient is not finite, or its square is not: the step is skipped (%d so far)", self.total)
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"gradients, or their squares, were not finite {self.in_a_row} steps in a row, from step {step} on;"
                " lower the learning rate or resume from an earlier checkpoint"
            )


def have_no_gradient(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is None or zero. The same on all ranks; a collective if parameters are sharded."""
    ordered = sorted(parameters, key=Tensor.numel)  # in most cases the first and smallest one decides
    nothing = not any(p.grad is not None and bool(local(p.grad).any()) for p in ordered)
    if any(map(is_sharded, ordered)):
        return true_on_all_ranks(torch.tensor(nothing, device=local(ordered[0]).device))
    return nothing


def gradients_and_limits(
    groups: Iterable[Mapping[str, Any]], curvature: Curvature | None, norm_control: str
) -> tuple[list[Tensor], list[float]]:
    """Every gradient, and the largest magnitude of its entries at which the state stays finite."""
    gradients, limits = [], []
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            if curvature is not None and curvature.preconditions(name):
                # An average computes the difference of its old value and the new one: hence half of the range.
                # Statistics have their own check.
                most = torch.finfo(parameter.dtype).max / 2
                fixed = NORM_CONTROLS[norm_control].fixes_length
                limits.append(most if fixed else min(most, of_finite_square(parameter.dtype)))
            else:
                limits.append(largest_gradient(group, parameter.dtype))
    return gradients, limits


def are_in_range(gradients: Sequence[Tensor], limits: Sequence[float]) -> bool:
    """Whether every entry of every gradient is finite and at most its limit in magnitude. One transfer to the host.

    A collective if gradients are sharded.

    Args:
        gradients: the gradients, of any dtypes and devices.
        limits: the largest allowed magnitude for each gradient, finite.
    """
    # An empty tensor has no maximum.
    pairs = [(part, limit) for part, limit in zip(map(local, gradients), limits, strict=True) if part.numel()]
    # Minimum and maximum keep a NaN. They cannot overflow, unlike a sum.
    extremes = [x.to(gradients[0].device, torch.float64) for part, _ in pairs for x in torch.aminmax(part)]
    found = torch.stack(extremes).view(-1, 2).tolist() if extremes else []
    # A comparison with NaN is false.
    fit = all(-limit <= low and high <= limit for (low, high), (_, limit) in zip(found, pairs, strict=True))
    if any(map(is_sharded, gradients)):
        return true_on_all_ranks(torch.tensor(fit, device=gradients[0].device))
    return fit
