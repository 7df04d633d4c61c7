"""K-FAC: the Fisher block of a layer as a Kronecker product, `F ≈ A ⊗ B` (Martens & Grosse 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import Plan, State, Statistic, TokenBlock, update_averages
from hf_so2.curvature.parts import costs, spectrum
from hf_so2.curvature.parts.forms import from_left, from_right, root
from hf_so2.curvature.parts.moments import INDEPENDENT, Moments, Rows
from hf_so2.damping import Damping


@dataclass(frozen=True)
class KFAC(TokenBlock):
    """`P(G) = (B + ρ_B I)^-e_B G (A + ρ_A I)^-e_A`.

    Exponents (1, 1) give K-FAC, and (½, ½) its square-root variant. A side with exponent 0 is the identity and has no
    statistics.

    State: the averages `A` (fan_in, fan_in), `B` (fan_out, fan_out), uncorrected, with `weight`, the running average of
    1; `A_root` and `B_root`, the powers of the damped factors. On a diagonal side both are vectors.

    Args:
        beta: decay of the running averages, in [0, 1).
        exponent_a: e_A ≥ 0.
        exponent_b: e_B ≥ 0, not both zero.
        moments: how the block is split into factors.
        diagonal: the sides, of "A" and "B", whose factor is kept as a diagonal.
        block_size: the largest dimension of a diagonal block of the other sides' factors; None for one block. Entries
            outside the blocks are left out. Each block is damped by itself.
    """

    beta: float
    exponent_a: float = 1.0
    exponent_b: float = 1.0
    moments: Moments = INDEPENDENT
    diagonal: str = ""
    block_size: int | None = None

    @property
    def exponents(self) -> dict[str, float]:
        """The exponent of each side that is not the identity."""
        return {side: e for side, e in (("A", self.exponent_a), ("B", self.exponent_b)) if e}

    @property
    def statistics(self) -> dict[str, Statistic]:
        idle = {"A", "B"} - self.exponents.keys()
        return {name: statistic for name, statistic in self.moments.statistics.items() if name not in idle}

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        averages = self.moments.init_state(shape, device, dtype, self.diagonal, self.block_size)
        state = {name: averages[name] for name in ("weight", *self.statistics)}
        return state | {f"{side}_root": torch.zeros_like(state[side]) for side in self.exponents}

    def observe(
        self, state: State, inputs: Tensor, gradients: Tensor, known: State | None = None, plan: Plan | None = None
    ) -> State:
        return self.moments.observe(state, self.statistics, Rows(inputs, gradients, plan), known or {})

    def update(self, state: State, observation: State) -> None:
        update_averages(state, observation, self.beta)

    def damped_factors(self, state: State, damping: Damping) -> dict[str, tuple[Tensor, Tensor]]:
        """Each factor that is not the identity with its damping ρ."""
        # A side that is the identity counts as the number 1. A rule that compares the sides thus stays defined.
        one = torch.ones_like(state["weight"])[..., None, None]
        a, b = (self.moments.factor(state, side) if side in self.exponents else one for side in "AB")
        rho_a, rho_b = damping(a, b)
        return {side: pair for side, pair in (("A", (a, rho_a)), ("B", (b, rho_b))) if side in self.exponents}

    def refresh(self, state: State, damping: Damping) -> None:
        damped = self.damped_factors(state, damping)
        # All roots are computed before any is stored: if the second one fails, the first one must stay old too.
        roots = {side: root(*damped[side], exponent) for side, exponent in self.exponents.items()}
        for side, fresh in roots.items():
            state[f"{side}_root"].copy_(fresh)

    @property
    def refreshed(self) -> list[str]:
        return [f"{side}_root" for side in self.exponents]

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        return from_right(from_left(state.get("B_root"), gradient), state.get("A_root"))

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for side, damped in self.damped_factors(state, damping).items():
            found |= spectrum.of_roots({side: damped}, {side: state[f"{side}_root"]}, self.exponents[side])
        return found

    def refresh_flops(self, shape: costs.Shape) -> float:
        """An inverse (exponent 1) needs no eigendecomposition."""
        of_power = {
            side: costs.CHOLESKY_INVERSE if exponent == 1 else costs.EIGENDECOMPOSITION + costs.PRODUCT
            for side, exponent in self.exponents.items()
        }
        return sum(n * width**2 * of_power[name[0]] for name, n, width in costs.decomposed(self, shape))

    def precondition_flops(self, shape: costs.Shape) -> float:
        return costs.of_preconditioning(self, shape)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return costs.of_tokens(self, shape, tokens)

    def curvature_along(self, state: State, change: Tensor) -> Tensor | None:
        """`<Δ, F Δ>` with `F = A ⊗ B`."""
        if not self.models_the_loss:
            return None
        a, b = (self.moments.factor(state, side) for side in "AB")
        return (change * from_right(from_left(b, change), a)).sum()

    @property
    def models_the_loss(self) -> bool:
        return self.exponents.keys() == {"A", "B"}
