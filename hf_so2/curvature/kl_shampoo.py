"""KL-Shampoo: the Kronecker factors closest to the gradient's second moment in KL divergence (Lin et al. 2025).

arXiv 2509.03378.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import State, update_averages
from hf_so2.curvature.parts import costs, spectrum
from hf_so2.curvature.parts import sides as two_sided
from hf_so2.damping import Damping
from hf_so2.linalg import damped_root, largest_entry, per_matrix

_OTHER = {"L": "R", "R": "L"}


@dataclass(frozen=True)
class KLShampoo(two_sided.TwoRoots):
    """`P(G) = (L + ρ_L I)^-½ G (R + ρ_R I)^-½`, where each factor is whitened by the other before it is averaged.

    `L ← EMA(G R^-1 Gᵀ / fan_in)`, `R ← EMA(Gᵀ L^-1 G / fan_out)`: the fixed point minimises
    `KL(N(0, E[g gᵀ]) ‖ N(0, L ⊗ R))`. The inverses are those of the damped factors of the last refresh. A side
    that is left out is the identity throughout. The method is then one-sided Shampoo, up to the constant that it
    divides by.

    At the first gradient both factors count as g times the identity, where g is the root mean square of this gradient.
    The terms of the averages are then of order g from the first step on. With the plain identity the first term would
    be of order g² and the second of order 1. With it, for g = 1e-3, decay 0.95 and noise of fixed covariance, that one
    term outweighed all others for about a hundred steps. The updates at step 20 were 20 times smaller than later ones.

    State: the averages `L` (fan_out, fan_out), `R` (fan_in, fan_in), uncorrected, with `weight`, the running average of
    1; `L_root` and `R_root`, the inverse square roots of the damped factors.

    Args:
        beta: decay of the running averages, in [0, 1).
        sides: which of `L` and `R` there are.
    """

    beta: float
    sides: frozenset[str] = two_sided.BOTH

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        state = two_sided.square_states(shape, self.sides, device, dtype)
        for side in self.sides:
            state[f"{side}_root"] = torch.eye(len(state[side]), device=device, dtype=dtype)
        return state

    def observe_gradient(self, state: State, gradient: Tensor) -> State:
        observation = {}
        for side in self.sides:
            # (G R^-½) (G R^-½)ᵀ is positive semi-definite by construction; with round-off, G R^-1 Gᵀ need not be.
            whitened = two_sided.apply(self._whitening(state, _OTHER[side], gradient), gradient)
            observation[side] = two_sided.gram(whitened, side).div_(gradient.shape[-1 if side == "L" else -2])
        return observation

    def _whitening(self, state: State, side: str, gradient: Tensor) -> dict[str, Tensor]:
        """The inverse square root of a factor, which whitens the other one. Empty if the side is left out."""
        if side not in self.sides:
            return {}
        root, is_known = state[f"{side}_root"], state[side].diagonal(dim1=-2, dim2=-1).any(dim=-1)
        # On a CPU the check is free, and a division by one is not.
        if is_known.device.type == "cpu" and bool(is_known.all()):
            return {side: root}
        unit = torch.where(is_known, torch.ones_like(state["weight"]), _root_mean_square(gradient))
        return {side: root / per_matrix(unit.sqrt(), root)}

    def update(self, state: State, observation: State) -> None:
        update_averages(state, observation, self.beta)

    def refresh(self, state: State, damping: Damping) -> None:
        factors = two_sided.damped_factors(state, self.sides, damping)
        # All roots are computed before any is stored: if the second one fails, the first one must stay old too.
        roots = {side: damped_root(factor, rho, 0.5) for side, (factor, rho) in factors.items()}
        for side, root in roots.items():
            state[f"{side}_root"].copy_(root)

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        factors = two_sided.damped_factors(state, self.sides, damping)
        return spectrum.of_roots(factors, two_sided.suffixed(state, "_root"), exponent=0.5)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        """Includes the whitening of the gradient by the other side before each product."""
        whitenings = self.sides if self.sides == two_sided.BOTH else ()
        return costs.of_sides(costs.shapes(self, shape), [*self.sides, *whitenings], shape)


def _root_mean_square(matrix: Tensor) -> Tensor:
    """Root mean square of the entries, shape (...); 1 for a zero matrix."""
    largest = largest_entry(matrix)
    # The square of a very large or very small entry would leave the range. Divided by the largest entry it does not.
    rms = largest * (matrix / per_matrix(largest, matrix)).square().mean(dim=(-2, -1)).sqrt()
    return torch.where(largest > 0, rms, torch.ones_like(rms))
