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
    that is left out is the identity throughout, which makes this one-sided Shampoo up to the constant that it divides
    by.

    Before the first gradient both factors are the identity times its root mean square g, so that what they are
    averages of is of order g from the first step on. With the plain identity the first term is of order g² and the
    second of order 1: for g = 1e-3, decay 0.95 and noise of fixed covariance, that one term outweighed all others for
    about a hundred steps, and updates at step 20 were smaller by a factor of 20 than they came to be.

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
            # (G R^-½) (G R^-½)ᵀ is positive semi-definite by construction, G R^-1 Gᵀ is not.
            whitened = two_sided.apply(self._whitening(state, _OTHER[side], gradient), gradient)
            observation[side] = two_sided.gram(whitened, side).div_(gradient.shape[-1 if side == "L" else -2])
        return observation

    def _whitening(self, state: State, side: str, gradient: Tensor) -> dict[str, Tensor]:
        """The inverse square root of a factor that the other one is whitened by; none where the side is left out."""
        if side not in self.sides:
            return {}
        root, is_known = state[f"{side}_root"], state[side].diagonal(dim1=-2, dim2=-1).any(dim=-1)
        # On a CPU looking costs nothing, and dividing by one does.
        if is_known.device.type == "cpu" and bool(is_known.all()):
            return {side: root}
        unit = torch.where(is_known, torch.ones_like(state["weight"]), _root_mean_square(gradient))
        return {side: root / per_matrix(unit.sqrt(), root)}

    def update(self, state: State, observation: State) -> None:
        update_averages(state, observation, self.beta)

    def refresh(self, state: State, damping: Damping) -> None:
        factors = two_sided.damped_factors(state, self.sides, damping)
        # All roots before any is stored: a failure of the second must not leave the first one new.
        roots = {side: damped_root(factor, rho, 0.5) for side, (factor, rho) in factors.items()}
        for side, root in roots.items():
            state[f"{side}_root"].copy_(root)

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        factors = two_sided.damped_factors(state, self.sides, damping)
        return spectrum.of_roots(factors, two_sided.suffixed(state, "_root"), exponent=0.5)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        """The gradient is whitened by the other side before either product."""
        whitenings = self.sides if self.sides == two_sided.BOTH else ()
        return costs.of_sides(costs.shapes(self, shape), [*self.sides, *whitenings], shape)


def _root_mean_square(matrix: Tensor) -> Tensor:
    """Of the entries, shape (...); 1 for a zero matrix."""
    largest = largest_entry(matrix)
    # Squares of entries near the ends of the range would leave it; relative to the largest entry they do not.
    rms = largest * (matrix / per_matrix(largest, matrix)).square().mean(dim=(-2, -1)).sqrt()
    return torch.where(largest > 0, rms, torch.ones_like(rms))
