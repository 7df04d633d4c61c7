"""EKFAC: a corrected diagonal in K-FAC's eigenbasis (George et al. 2018, arXiv 1806.03884)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import State, Statistic, TokenBlock, update_average, update_averages
from hf_so2.curvature.moments import INDEPENDENT, Moments
from hf_so2.damping import Damping
from hf_so2.linalg import DecompositionError, eigenspace_mean, eigh


@dataclass(frozen=True)
class EKFAC(TokenBlock):
    """`P(G) = U_B [ (U_Bᵀ G U_A) / (S + ρ) ] U_Aᵀ`, where `U_A`, `U_B` are the eigenbases of the factors `A`, `B`.

    `S_ij = E[(U_Bᵀ δ)_i² (U_Aᵀ h)_j²]` is the diagonal of the Fisher block in the Kronecker eigenbasis, the best
    diagonal there in Frobenius norm (proposition 1). It is an average of its own: the first basis seeds it with the
    Kronecker product of the eigenvalues; a later basis carries it over as the diagonal of the old approximation in the
    new basis, which keeps its trace.

    Within an eigenspace of a repeated eigenvalue, every basis is an eigenbasis and S depends on which one the
    decomposition happened to return: in the null spaces of the first steps, with fewer tokens than dimensions, another
    split of the same batch would give another update. There S is averaged over the eigenspace, which keeps its trace.

    State: the averages of `moments` with their `weight`; `A_basis` (fan_in, fan_in), `B_basis` (fan_out, fan_out) and
    their eigenvalues `A_values` (fan_in,), `B_values` (fan_out,); `S` (fan_out, fan_in); `rho`, 0-dim.

    Args:
        beta: decay of the running averages, in [0, 1).
        moments: how the block is split into the factors whose eigenbases are used.
    """

    beta: float
    moments: Moments = INDEPENDENT

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {**self.moments.statistics, "S": Statistic(gradient_degree=2, per="tokens")}

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        state = self.moments.init_state(shape, device, dtype)
        state |= {f"{side}_basis": torch.zeros_like(state[side]) for side in "AB"}
        state |= {f"{side}_values": torch.zeros_like(state[side][0]) for side in "AB"}
        state |= {"S": torch.zeros(shape, device=device, dtype=dtype), "rho": torch.zeros_like(state["weight"])}
        return state

    def observe(self, state: State, inputs: Tensor, gradients: Tensor, known: State | None = None) -> State:
        sums = self.moments.observe(self.moments.statistics, inputs, gradients, known or {})
        # Before the first refresh the bases are zero, and so is this sum.
        rotated_inputs, rotated_gradients = inputs @ state["A_basis"], gradients @ state["B_basis"]
        return sums | {"S": rotated_gradients.square().mT @ rotated_inputs.square()}

    def update(self, state: State, observation: State) -> None:
        update_averages(state, {name: observation[name] for name in self.moments.statistics}, self.beta)
        # S starts from a seed, not from zero, so it needs no bias correction; until it is seeded it stays zero.
        observed = _over_eigenspaces(observation["S"], state["B_values"], state["A_values"])
        update_average(state, "S", torch.where(state["S"].any(), observed, state["S"]), self.beta)

    def refresh(self, state: State, damping: Damping) -> None:
        values_a, basis_a = eigh(self.moments.factor(state, "A"))
        values_b, basis_b = eigh(self.moments.factor(state, "B"))
        carried = _overlap(basis_b, state["B_basis"]) @ state["S"] @ _overlap(basis_a, state["A_basis"]).mT
        s = torch.where(state["S"].any(), carried, values_b.outer(values_a))
        s = _over_eigenspaces(s, values_b, values_a)
        rho = damping.single(s)
        # Products of eigenvalues overflow before the factors do, and a small share of denormal numbers is zero.
        if not bool(torch.isfinite(s.sum() + rho) & (rho > 0)):
            raise DecompositionError(f"the eigenvalues of a {tuple(s.shape)} block leave the range of {s.dtype}")
        state["S"].copy_(s)
        state["rho"].copy_(rho)
        for side, values, basis in (("A", values_a, basis_a), ("B", values_b, basis_b)):
            state[f"{side}_values"].copy_(values)
            state[f"{side}_basis"].copy_(basis)

    @property
    def refreshed(self) -> list[str]:
        return ["A_values", "B_values", "A_basis", "B_basis", "S", "rho"]

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        rotated = state["B_basis"].mT @ gradient @ state["A_basis"]
        return state["B_basis"] @ (rotated / (state["S"] + state["rho"])) @ state["A_basis"].mT


def _overlap(new: Tensor, old: Tensor) -> Tensor:
    """`(U_newᵀ U_old)²` entry by entry: turns the diagonal of a matrix in the old basis into its diagonal in the
    new.
    """
    return (new.mT @ old).square()


def _over_eigenspaces(s: Tensor, values_b: Tensor, values_a: Tensor) -> Tensor:
    """S averaged over each pair of eigenspaces."""
    return eigenspace_mean(values_b) @ s @ eigenspace_mean(values_a)
