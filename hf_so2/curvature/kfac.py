"""K-FAC: the Fisher block of a layer as a Kronecker product, `F ≈ A ⊗ B` (Martens & Grosse 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_so2.curvature.base import State, Statistic, corrected_average, update_average
from hf_so2.damping import Damping
from hf_so2.linalg import damped_inverse


@dataclass(frozen=True)
class KFAC:
    """`P(G) = (B + ρ_B I)^-1 G (A + ρ_A I)^-1` with `A = E[h hᵀ]` and `B = E[δ δᵀ]`.

    State: `A`, `A_inverse` (fan_in, fan_in); `B`, `B_inverse` (fan_out, fan_out); `weight`, 0-dim, the running average
    of 1 for the bias correction. Averages are stored uncorrected.

    Args:
        beta: decay of the running averages, in [0, 1).
    """

    beta: float

    statistics: ClassVar[dict[str, Statistic]] = {
        "A": Statistic(gradient_degree=0, per="rows"),
        "B": Statistic(gradient_degree=2, per="tokens"),
    }

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        fan_out, fan_in = shape
        state = {"weight": torch.zeros((), device=device, dtype=dtype)}
        for factor, dim in (("A", fan_in), ("B", fan_out)):
            state[factor] = torch.zeros(dim, dim, device=device, dtype=dtype)
            state[f"{factor}_inverse"] = torch.zeros(dim, dim, device=device, dtype=dtype)
        return state

    def observe(self, state: State, inputs: Tensor, gradients: Tensor) -> State:
        return {"A": inputs.mT @ inputs, "B": gradients.mT @ gradients}

    def update(self, state: State, observation: State) -> None:
        update_average(state, "A", observation["A"], self.beta)
        update_average(state, "B", observation["B"], self.beta)
        update_average(state, "weight", torch.ones_like(state["weight"]), self.beta)

    def refresh(self, state: State, damping: Damping) -> None:
        a, b = corrected_average(state, "A"), corrected_average(state, "B")
        rho_a, rho_b = damping(a, b)
        inverse_a, inverse_b = damped_inverse(a, rho_a), damped_inverse(b, rho_b)
        state["A_inverse"].copy_(inverse_a)
        state["B_inverse"].copy_(inverse_b)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        return state["B_inverse"] @ gradient @ state["A_inverse"]
