"""SOAP: Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2024, arXiv 2409.11321)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_so2.curvature.base import RotatingBlock, State, corrected_average, update_average, update_averages
from hf_so2.curvature.parts import costs
from hf_so2.curvature.parts import sides as two_sided
from hf_so2.curvature.parts.forms import over_eigenspaces
from hf_so2.damping import Damping
from hf_so2.linalg import DecompositionError, eigh, follow_basis, has_null_space, is_finite, per_matrix
from hf_so2.linalg.eigen import RESOLUTION


@dataclass(frozen=True)
class SOAP(RotatingBlock):
    """`P(G) = U_L [ (U_Lᵀ G U_R) / (√V + ε) ] U_Rᵀ` with `V ← EMA((U_Lᵀ G U_R)²)` of each step's own gradient.

    `U_L`, `U_R` are the eigenbases of `L ← EMA(G Gᵀ)` and `R ← EMA(Gᵀ G)`. The first refresh and every `full_every`-th
    one decompose the factors. The other refreshes make one QR power step (algorithm 4). A factor with a null space is
    decomposed at every refresh: the vectors of a null space are arbitrary, and so is what a power step makes of them.
    Another split of the same batch would then give another update.

    When a basis moves, V becomes the diagonal of the old second moment in the new basis. If basis vectors only change
    places, V is permuted like them. Its trace stays the same. Eigenvalues that a decomposition cannot distinguish do
    not determine the basis of their eigenspace. V is averaged over such an eigenspace, as in `EKFAC`.

    The first update only builds the basis. In its own basis G is diagonal, and `G/√V` would be the sign of round-off.
    `building_steps` therefore makes the weight and its momentum skip this update. A side that is left out keeps the
    identity as its basis. With neither side this is Adam. Damping is not used: ε is added to the denominator instead.

    State: the averages `L` (fan_out, fan_out), `R` (fan_in, fan_in), uncorrected, with `weight`, the running average of
    1; `L_basis`, `R_basis` and their eigenvalues `L_values`, `R_values`; `V` (fan_out, fan_in), uncorrected, with
    `V_weight`; `refreshes`, 0-dim; with `keeps_momentum`, `M` (fan_out, fan_in) in the bases.

    Args:
        beta: decay of the running averages, V's too, in [0, 1).
        eps: ε of Adam, ≥ 0, in units of the gradient.
        full_every: number of refreshes from one full eigendecomposition to the next, ≥ 1.
        tolerance: at a refresh without a full decomposition, a basis stays unchanged if the off-diagonal share of its
            factor in this basis, in Frobenius norm, is at most this; 0 always moves it.
        sides: which of `L` and `R` there are.
        keeps_momentum: as in `RotatingBlock`.
    """

    building_steps: ClassVar[int] = 1
    corrects_momentum: ClassVar[bool] = True

    beta: float
    eps: float = 1e-8
    full_every: int = 10
    tolerance: float = 0.0
    sides: frozenset[str] = two_sided.BOTH
    keeps_momentum: bool = False

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        state = two_sided.square_states(shape, self.sides, device, dtype)
        state |= {f"{side}_basis": torch.zeros_like(state[side]) for side in self.sides}
        state |= {f"{side}_values": torch.zeros_like(state[side][0]) for side in self.sides}
        state |= {name: torch.zeros_like(state["weight"]) for name in ("V_weight", "refreshes")}
        return state | {name: torch.zeros(shape, device=device, dtype=dtype) for name in self._turning}

    @property
    def _turning(self) -> tuple[str, ...]:
        """The names of the tensors that are kept in the bases and move with them."""
        return ("V", "M") if self.keeps_momentum else ("V",)

    def observe_gradient(self, state: State, gradient: Tensor) -> State:
        # Before the first refresh the bases are zero, so this square is zero too.
        rotated = self.rotate(state, gradient)
        observation = {side: two_sided.gram(gradient, side) for side in self.sides} | {"V": rotated.square()}
        return observation | {"rotated": rotated} if self.keeps_momentum else observation

    def update(self, state: State, observation: State) -> None:
        update_averages(state, {side: observation[side] for side in self.sides}, self.beta)
        update_average(
            state, "V", over_eigenspaces(observation["V"], state.get("L_values"), state.get("R_values")), self.beta
        )
        has_basis = (
            (state["refreshes"] > 0).to(state["weight"].dtype) if self.sides else torch.ones_like(state["weight"])
        )
        update_average(state, "V_weight", has_basis, self.beta)

    def refresh(self, state: State, damping: Damping) -> None:
        is_full = state["refreshes"] % self.full_every == 0
        moved = {name: state[name] for name in self._turning}
        for side in self.sides:
            moved[f"{side}_values"], moved[f"{side}_basis"] = self._moved_basis(state, side, is_full)
            turn = moved[f"{side}_basis"].mT @ state[f"{side}_basis"]
            # V is the diagonal of a second moment: it changes with the squared entries of the rotation.
            for name, by in (("M", turn), ("V", turn.square())):
                if name in moved:
                    moved[name] = by @ moved[name] if side == "L" else moved[name] @ by.mT
        moved["V"] = over_eigenspaces(moved["V"], moved.get("L_values"), moved.get("R_values"))
        for name in self._turning:
            if not is_finite(moved[name]):
                raise DecompositionError(f"a moment {name} of a {tuple(moved[name].shape)} block is not finite")
        for name, value in moved.items():
            state[name].copy_(value)
        state["refreshes"].add_(1)

    def _moved_basis(self, state: State, side: str, is_full: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and basis of one side for its current factor."""
        factor = corrected_average(state, side)
        is_decomposed = is_full | has_null_space(state[f"{side}_values"])
        if bool(is_decomposed.all()):
            return eigh(factor)
        followed = follow_basis(factor, state[f"{side}_basis"], self.tolerance)
        if bool(is_decomposed.any()):  # some of a stack
            followed = followed[0].clone(), followed[1].clone()  # these may be the state's own tensors
            for whole, part in zip(followed, eigh(factor[is_decomposed]), strict=True):
                whole[is_decomposed] = part
        return followed

    @property
    def refreshed(self) -> list[str]:
        moved = [side + suffix for side in sorted(self.sides) for suffix in ("_values", "_basis")]
        return [*moved, *self._turning, "refreshes"]

    def rotate(self, state: State, gradient: Tensor) -> Tensor:
        """`U_Lᵀ G U_R`."""
        bases = two_sided.suffixed(state, "_basis")
        return two_sided.apply({side: u.mT if side == "L" else u for side, u in bases.items()}, gradient)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """As in the class. It is zero until V has seen a gradient, since the length of a step is unknown before."""
        return self.precondition_rotated(state, self.rotate(state, gradient))

    def precondition_rotated(self, state: State, rotated: Tensor) -> Tensor:
        weight = state["V_weight"]
        one, eps = torch.ones_like(weight), torch.full_like(weight, self.eps)
        # In place, since memory for a copy takes longer than a product. Before the first gradient the divisor is
        # infinite.
        divisor = (state["V"] / per_matrix(torch.where(weight > 0, weight, one), rotated)).sqrt_()
        divisor.add_(per_matrix(torch.where(weight > 0, eps, torch.inf), rotated))
        scaled = torch.div(rotated, divisor, out=divisor)
        bases = two_sided.suffixed(state, "_basis")
        return two_sided.apply({side: u if side == "L" else u.mT for side, u in bases.items()}, scaled)

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        """Nothing is damped. The eigenvalues are those of the current basis, at least what a decomposition resolves."""
        found: dict[str, Tensor] = {}
        for side, factor in two_sided.suffixed(state, "").items():
            values = state[f"{side}_values"]
            largest = values.max().clamp(min=torch.finfo(values.dtype).tiny)
            least = values.min().clamp(min=0) / largest
            found |= {
                f"trace_{side}": factor.trace() / state["weight"],
                f"condition_{side}": 1 / least.clamp(min=RESOLUTION * torch.finfo(values.dtype).eps),
            }
        return found

    def refresh_flops(self, shape: costs.Shape) -> float:
        """As EKFAC's, but most decompositions are replaced by a power step: a product and a QR factorization."""
        share = 1 / self.full_every
        power_step = costs.PRODUCT * (1 + (self.tolerance > 0)) + costs.QR
        basis = share * costs.EIGENDECOMPOSITION + (1 - share) * power_step
        turned = self._rotation_flops(shape) * len(self._turning)
        return turned + sum((basis + costs.PRODUCT) * n**3 for _, n, _ in costs.decomposed(self, shape))

    def precondition_flops(self, shape: costs.Shape) -> float:
        return costs.of_preconditioning(self, shape)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return costs.of_sides(costs.shapes(self, shape), self.sides, shape) + self._rotation_flops(shape)

    def _rotation_flops(self, shape: costs.Shape) -> float:
        """FLOPs to rotate a matrix of this shape into both bases, or out of them."""
        return costs.of_preconditioning(self, shape) / 2
