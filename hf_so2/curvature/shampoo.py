"""Shampoo: second moments of the gradient matrix on both of its sides (Gupta et al. 2018, arXiv 1802.09568)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import State, update_averages
from hf_so2.curvature.parts import costs, spectrum
from hf_so2.curvature.parts import sides as two_sided
from hf_so2.damping import Damping
from hf_so2.errors import ConfigurationError
from hf_so2.linalg import damped_root, newton_root, per_matrix, trace


@dataclass(frozen=True)
class Shampoo(two_sided.TwoRoots):
    """`P(G) = (L + ρ_L I)^-p G (R + ρ_R I)^-p` with `L ← EMA(G Gᵀ)`, `R ← EMA(Gᵀ G)`.

    p = ¼ is the original. p = ½ times `√tr(L)` is the square root of the best Kronecker approximation of `E[g gᵀ]`,
    `L ⊗ R / tr(L)` (Morwani et al. 2024, arXiv 2406.17748). Both are independent of the gradient's scale.

    If one side is left out, p is ½ on the other, whatever `exponent` says, and nothing is normalised. There are two
    reasons. Shampoo's regret bound needs exponents that add up to ½ over the sides (Anil et al. 2020, arXiv 2002.09018,
    who do so for embeddings and heads). And `I ⊗ R` approximates `E[g gᵀ]` up to a constant, which leads to the same
    root (An et al. 2025, arXiv 2503.20762; Xie et al. 2025, arXiv 2503.10537). This form too is independent of the
    gradient's scale.

    State: the averages `L` (fan_out, fan_out), `R` (fan_in, fan_in), uncorrected, with `weight`, the running average of
    1; `L_root` and `R_root`, the powers of the damped factors. `L_root` includes the trace normalisation, if any.

    Args:
        beta: decay of the running averages, in [0, 1). Sums ignore it.
        exponent: p, ¼ or ½.
        normalized: whether to multiply by `√tr(L)`; with p = ½ only.
        accumulate: `ema`, a bias-corrected running average, or `sum`, the sum over all steps as in AdaGrad.
        sides: which of `L` and `R` there are.
        root: `eigen`, by eigendecomposition, or `newton`, by the coupled Newton iteration.

    Raises:
        ConfigurationError: a combination that is not allowed.
    """

    beta: float
    exponent: float = 0.25
    normalized: bool = False
    accumulate: str = "ema"
    sides: frozenset[str] = two_sided.BOTH
    root: str = "eigen"

    def __post_init__(self) -> None:
        if self.exponent not in (0.25, 0.5):
            raise ConfigurationError("exponent", self.exponent, "must be 0.25 or 0.5")
        if self.normalized and self.exponent != 0.5:
            raise ConfigurationError("normalized", True, "needs exponent=0.5; with 0.25 nothing is left to normalise")
        if self.accumulate not in ("ema", "sum"):
            raise ConfigurationError("accumulate", self.accumulate, "must be 'ema' or 'sum'")
        if self.root not in ("eigen", "newton"):
            raise ConfigurationError("root", self.root, "must be 'eigen' or 'newton'")

    @property
    def power(self) -> float:
        """The exponent in use. It is ½ if one side is left out."""
        return self.exponent if self.sides == two_sided.BOTH else 0.5

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        state = two_sided.square_states(shape, self.sides, device, dtype)
        return state | {f"{side}_root": torch.zeros_like(state[side]) for side in self.sides}

    def observe_gradient(self, state: State, gradient: Tensor) -> State:
        return {side: two_sided.gram(gradient, side) for side in self.sides}

    def update(self, state: State, observation: State) -> None:
        if self.accumulate == "ema":
            update_averages(state, observation, self.beta)
            return
        for side, value in observation.items():
            state[side].add_(value)
        state["weight"].fill_(1)  # a sum needs no bias correction

    def refresh(self, state: State, damping: Damping) -> None:
        factors = two_sided.damped_factors(state, self.sides, damping)
        # All roots are computed before any is stored: if the second one fails, the first one must stay old too.
        roots = {side: self._root(factor, rho) for side, (factor, rho) in factors.items()}
        if self.normalized and self.sides == two_sided.BOTH:
            roots["L"] = roots["L"] * per_matrix(normalisation(factors["L"][0]), roots["L"])
        for side, root in roots.items():
            state[f"{side}_root"].copy_(root)

    def _root(self, factor: Tensor, rho: Tensor) -> Tensor:
        if self.root == "newton":
            return newton_root(factor, rho, round(1 / self.power))
        return damped_root(factor, rho, self.power)

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        roots = two_sided.suffixed(state, "_root")
        factors = two_sided.damped_factors(state, self.sides, damping)
        if self.normalized and self.sides == two_sided.BOTH:
            roots["L"] = roots["L"] / normalisation(factors["L"][0])
        return spectrum.of_roots(factors, roots, self.power)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return costs.of_sides(costs.shapes(self, shape), self.sides, shape)


def normalisation(factor: Tensor) -> Tensor:
    """`√tr(L)`, shape (...). For a factor of zero it is 1, since damping turns that factor into the identity."""
    size = trace(factor)
    return torch.where(size > 0, size.sqrt(), torch.ones_like(size))
