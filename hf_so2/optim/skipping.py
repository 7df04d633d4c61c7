"""Steps that are left out because a gradient, or what the state would keep of it, is not finite."""

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
        logger.warning("a gradient is not finite, or its square is not: the step is skipped (%d so far)", self.total)
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"gradients, or their squares, were not finite {self.in_a_row} steps in a row, from step {step} on;"
                " lower the learning rate or resume from an earlier checkpoint"
            )


def have_no_gradient(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is None or zero. The same on all ranks: with sharded parameters a collective."""
    ordered = sorted(parameters, key=Tensor.numel)  # mostly the first and smallest decides
    nothing = not any(p.grad is not None and bool(local(p.grad).any()) for p in ordered)
    if any(map(is_sharded, ordered)):
        return true_on_all_ranks(torch.tensor(nothing, device=local(ordered[0]).device))
    return nothing


def gradients_and_limits(
    groups: Iterable[Mapping[str, Any]], curvature: Curvature | None, norm_control: str
) -> tuple[list[Tensor], list[float]]:
    """Every gradient, and how large its entries may be before they would make what the state keeps infinite."""
    gradients, limits = [], []
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            if curvature is not None and curvature.preconditions(name):
                # An average takes the difference of what is in it and what enters; statistics are looked at apart.
                most = torch.finfo(parameter.dtype).max / 2
                fixed = NORM_CONTROLS[norm_control].fixes_length
                limits.append(most if fixed else min(most, of_finite_square(parameter.dtype)))
            else:
                limits.append(largest_gradient(group, parameter.dtype))
    return gradients, limits


def are_in_range(gradients: Sequence[Tensor], limits: Sequence[float]) -> bool:
    """Whether every entry of every gradient is finite and no larger than its limit; one transfer to the host.

    With sharded gradients a collective.

    Args:
        gradients: any dtypes and devices.
        limits: the largest magnitude of each, finite.
    """
    # An empty tensor has no maximum.
    pairs = [(part, limit) for part, limit in zip(map(local, gradients), limits, strict=True) if part.numel()]
    # Extremes pass on a NaN and cannot overflow where the gradients themselves have not.
    extremes = [x.to(gradients[0].device, torch.float64) for part, _ in pairs for x in torch.aminmax(part)]
    found = torch.stack(extremes).view(-1, 2).tolist() if extremes else []
    # A comparison with a NaN is false.
    fit = all(-limit <= low and high <= limit for (low, high), (_, limit) in zip(found, pairs, strict=True))
    if any(map(is_sharded, gradients)):
        return true_on_all_ranks(torch.tensor(fit, device=gradients[0].device))
    return fit
