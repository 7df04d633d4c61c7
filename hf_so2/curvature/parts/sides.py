"""Code shared by the methods that have a factor on each side of the gradient: `L` on fan_out, `R` on fan_in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hf_so2.curvature.base import GradientBlock, State, corrected_average
from hf_so2.curvature.parts import costs
from hf_so2.curvature.parts.forms import from_left, from_right
from hf_so2.damping import Damping
from hf_so2.linalg import per_matrix, trace

BOTH: frozenset[str] = frozenset("LR")
"""The sides of a matrix that can be preconditioned; one that is left out is the identity."""


class TwoRoots(GradientBlock, Protocol):
    """A block that multiplies by a root of each side's factor, kept as `L_root` and `R_root`; `sides` are its sides."""

    sides: frozenset[str]

    @property
    def refreshed(self) -> list[str]:
        return [f"{side}_root" for side in sorted(self.sides)]

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        return apply(suffixed(state, "_root"), gradient)

    def refresh_flops(self, shape: costs.Shape) -> float:
        return costs.of_roots(self, shape)

    def precondition_flops(self, shape: costs.Shape) -> float:
        return costs.of_preconditioning(self, shape)


def square_states(shape: tuple[int, int], sides: frozenset[str], device: torch.device, dtype: torch.dtype) -> State:
    """A zero matrix for each side, `L` (fan_out, fan_out) and `R` (fan_in, fan_in), and a zero `weight`."""
    state = {"weight": torch.zeros((), device=device, dtype=dtype)}
    for side, size in zip("LR", shape, strict=True):
        if side in sides:
            state[side] = torch.zeros(size, size, device=device, dtype=dtype)
    return state


def gram(gradient: Tensor, side: str) -> Tensor:
    """`G Gᵀ` for `L`, `Gᵀ G` for `R`."""
    return gradient @ gradient.mT if side == "L" else gradient.mT @ gradient


def apply(matrices: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
    """`X_L G X_R`, where a side that is not in `matrices` is the identity."""
    return from_right(from_left(matrices.get("L"), gradient), matrices.get("R"))


def suffixed(state: State, suffix: str) -> dict[str, Tensor]:
    """The tensors `L<suffix>` and `R<suffix>` that the state has, by side."""
    return {side: state[side + suffix] for side in "LR" if side + suffix in state}


def damped_factors(state: State, sides: frozenset[str], damping: Damping) -> dict[str, tuple[Tensor, Tensor]]:
    """Each side's bias-corrected factor and its damping ρ.

    A side that is left out counts as the number 1. A rule that compares the sides thus stays defined. A factor is
    negligible if a small fraction of it would no longer be a normal number. This happens if gradients are, or have long
    been, about zero. Such a factor counts as zero, and damping turns it into the identity.

    Raises:
        DecompositionError: the rule needs eigenvalues, and a factor has none.
    """
    one = torch.ones_like(state["weight"])[..., None, None]
    left, right = (_zero_if_negligible(corrected_average(state, side)) if side in sides else one for side in "LR")
    rho_right, rho_left = damping(right, left)
    return {side: pair for side, pair in (("L", (left, rho_left)), ("R", (right, rho_right))) if side in sides}


def _zero_if_negligible(factor: Tensor) -> Tensor:
    """Set the factor to zero, in place, if it is negligible."""
    limits = torch.finfo(factor.dtype)
    return factor.mul_(per_matrix(~(trace(factor) < limits.tiny / limits.eps), factor))
