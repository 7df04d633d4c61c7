"""EKFAC: a corrected diagonal in K-FAC's eigenbasis (George et al. 2018, arXiv 1806.03884)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import Plan, State, Statistic, TokenBlock, update_average, update_averages
from hf_so2.curvature.parts import costs
from hf_so2.curvature.parts.forms import (
    from_left,
    from_right,
    in_turn,
    is_one_hot,
    over_eigenspaces,
    overlap,
    sum_by_index,
    transposed,
)
from hf_so2.curvature.parts.moments import INDEPENDENT, Moments, Rows
from hf_so2.damping import Damping
from hf_so2.linalg import DecompositionError, block_diagonal, eigh, per_matrix


@dataclass(frozen=True)
class EKFAC(TokenBlock):
    """`P(G) = U_B [ (U_Bᵀ G U_A) / (S + ρ) ] U_Aᵀ`, where `U_A`, `U_B` are the eigenbases of the factors `A`, `B`.

    `S_ij = E[(U_Bᵀ δ)_i² (U_Aᵀ h)_j²]` is the diagonal of the Fisher block in the Kronecker eigenbasis. It is the best
    diagonal there in Frobenius norm (proposition 1). S has its own running average. The first basis seeds it with the
    Kronecker product of the eigenvalues. At a new basis, S becomes the diagonal of the old approximation in the new
    basis. This keeps its trace.

    In the eigenspace of a repeated eigenvalue, every basis is an eigenbasis, and S depends on the one that the
    decomposition happens to return. This occurs in the null spaces of the first steps, with fewer tokens than
    dimensions: another split of the same batch would give another update. S is therefore averaged over each eigenspace,
    which keeps its trace.

    State: the averages of `moments` with their `weight`; `A_basis` (fan_in, fan_in), `B_basis` (fan_out, fan_out) and
    their eigenvalues `A_values` (fan_in,), `B_values` (fan_out,); `S` (fan_out, fan_in); `rho`, 0-dim. A diagonal side
    is in its eigenbasis already. The state has neither a basis nor eigenvalues for it.

    Args:
        beta: decay of the running averages, in [0, 1).
        moments: how the block is split into the factors whose eigenbases are used.
        diagonal: the sides, of "A" and "B", whose factor is kept as a diagonal.
        moment_stride: S is observed on one row of every `moment_stride`, see `hf_so2.curvature.parts.forms.in_turn`;
            None leaves it to the plan of the rows.
            For an embedding it is observed on all rows, since a rare token may not be missed.
        block_size: as in `KFAC`. Each pair of blocks has its own ρ.
    """

    beta: float
    moments: Moments = INDEPENDENT
    diagonal: str = ""
    moment_stride: int | None = 1
    block_size: int | None = None

    @property
    def statistics(self) -> dict[str, Statistic]:
        return {**self.moments.statistics, "S": Statistic(gradient_degree=2, per="tokens")}

    @property
    def rotated(self) -> list[str]:
        """The sides that have a basis."""
        return [side for side in "AB" if side not in self.diagonal]

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        state = self.moments.init_state(shape, device, dtype, self.diagonal, self.block_size)
        state |= {f"{side}_basis": torch.zeros_like(state[side]) for side in self.rotated}
        state |= {f"{side}_values": torch.zeros_like(state[side][:, 0]) for side in self.rotated}
        state["S"] = torch.zeros(shape, device=device, dtype=dtype)
        counts = tuple(map(len, self._parts(state["S"])))
        state["rho"] = torch.zeros(counts if max(counts) > 1 else (), device=device, dtype=dtype)
        return state

    def _parts(self, s: Tensor) -> list[list[tuple[int, int]]]:
        """The ranges (begin, end) of the blocks of fan_out and of fan_in."""
        return [
            list(block_diagonal.bounds(size, size if side in self.diagonal else self.block_size or size))
            for side, size in zip("BA", s.shape[-2:], strict=True)
        ]

    def _rho(self, s: Tensor, damping: Damping) -> Tensor:
        """ρ of shape (...), or one for each pair of blocks, (..., blocks of fan_out, blocks of fan_in)."""
        rows, columns = self._parts(s)
        if len(rows) == len(columns) == 1:
            return damping.single(s, self.diagonal)
        of_rows = [[damping.single(s[..., a:b, c:d], self.diagonal) for c, d in columns] for a, b in rows]
        return torch.stack([torch.stack(row, dim=-1) for row in of_rows], dim=-2)

    def damped(self, state: State) -> Tensor:
        """`S + ρ`, (..., fan_out, fan_in)."""
        s, rho = state["S"], state["rho"]
        rows, columns = self._parts(s)
        if len(rows) == len(columns) == 1:
            return s + per_matrix(rho, s)
        for dim, parts in ((-2, rows), (-1, columns)):
            lengths = torch.tensor([b - a for a, b in parts], device=s.device)
            rho = rho.repeat_interleave(lengths, dim=dim, output_size=s.shape[dim])
        return s + rho

    @property
    def observed(self) -> list[str]:
        return [f"{side}_basis" for side in self.rotated]

    def observe(
        self, state: State, inputs: Tensor, gradients: Tensor, known: State | None = None, plan: Plan | None = None
    ) -> State:
        sums = self.moments.observe(state, self.moments.statistics, Rows(inputs, gradients, plan), known or {})
        return sums | {"S": self._second_moments(state, inputs, gradients, plan)}

    def _second_moments(self, state: State, inputs: Tensor, gradients: Tensor, plan: Plan | None) -> Tensor:
        sample = None if is_one_hot(inputs) else self._sample(inputs, plan)
        h, delta = (inputs, gradients) if sample is None else (inputs[sample[0]], gradients[sample[0]])
        # Before the first refresh the bases are zero, so these sums are zero too.
        squared_gradients = from_right(delta, state.get("B_basis")).square()
        if is_one_hot(h):
            return sum_by_index(h, squared_gradients, state["S"].shape[1]).mT
        sums = squared_gradients.mT @ from_right(h, state.get("A_basis")).square()
        return sums if sample is None else sums.mul_(sample[1])

    def _sample(self, inputs: Tensor, plan: Plan | None) -> tuple[Tensor, float] | None:
        """The indices of the rows that S is observed on, and how many rows each stands for; None for all."""
        if self.moment_stride is not None:
            return in_turn(len(inputs), self.moment_stride, inputs.device)
        return None if plan is None else plan.sample()

    def update(self, state: State, observation: State) -> None:
        update_averages(state, {name: observation[name] for name in self.moments.statistics}, self.beta)
        # S starts from a seed, not from zero, so it needs no bias correction. It stays zero until it is seeded.
        observed = self._over_eigenspaces(observation["S"], state)
        update_average(state, "S", torch.where(_is_seeded(state), observed, state["S"]), self.beta)

    def _over_eigenspaces(self, s: Tensor, values: State) -> Tensor:
        return over_eigenspaces(s, values.get("B_values"), values.get("A_values"), self.block_size)

    def refresh(self, state: State, damping: Damping) -> None:
        factors = {side: self.moments.factor(state, side) for side in "AB"}
        spectra = {side: _spectrum(factors[side]) for side in self.rotated}
        values = {side: spectra[side][0] for side in spectra}
        overlaps = {side: overlap(spectra[side][1], state[f"{side}_basis"]) for side in spectra}
        carried = from_right(from_left(overlaps.get("B"), state["S"]), transposed(overlaps.get("A")))
        seed = (factors | values)["B"].unsqueeze(-1) * (factors | values)["A"].unsqueeze(-2)
        s = torch.where(_is_seeded(state), carried, seed)
        s = self._over_eigenspaces(s, {f"{side}_values": found for side, found in values.items()})
        rho = self._rho(s, damping)
        # Products of eigenvalues overflow before the factors do. ε times a denormal number underflows to zero.
        if not bool((torch.isfinite(s.sum() + rho) & (rho > 0)).all()):
            raise DecompositionError(f"the eigenvalues of a {tuple(s.shape)} block leave the range of {s.dtype}")
        state["S"].copy_(s)
        state["rho"].copy_(rho)
        for side, (eigenvalues, basis) in spectra.items():
            state[f"{side}_values"].copy_(eigenvalues)
            state[f"{side}_basis"].copy_(basis)

    @property
    def refreshed(self) -> list[str]:
        return [*(f"{side}_{part}" for part in ("values", "basis") for side in self.rotated), "S", "rho"]

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        basis_b, basis_a = state.get("B_basis"), state.get("A_basis")
        rotated = from_right(from_left(transposed(basis_b), gradient), basis_a)
        return from_right(from_left(basis_b, rotated / self.damped(state)), transposed(basis_a))

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        damped = self.damped(state)
        return {"trace": state["S"].sum(), "damping": state["rho"].mean(), "condition": damped.max() / damped.min()}

    def refresh_flops(self, shape: costs.Shape) -> float:
        """Includes the comparison of each basis with the last one, and the change of S to the new basis."""
        moved = sum(costs.PRODUCT * width * shape[0] * shape[1] for *_, width in costs.decomposed(self, shape))
        return moved + costs.of_roots(self, shape)

    def precondition_flops(self, shape: costs.Shape) -> float:
        return costs.of_preconditioning(self, shape)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return costs.of_tokens(self, shape, tokens)

    def curvature_along(self, state: State, change: Tensor) -> Tensor:
        """`<Δ, F Δ>` with the diagonal S in the eigenbasis. A diagonal side needs no change of basis."""
        rotated = from_right(from_left(transposed(state.get("B_basis")), change), state.get("A_basis"))
        return (rotated.square() * state["S"]).sum()

    @property
    def models_the_loss(self) -> bool:
        return True


def _spectrum(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n) and basis of a factor, block by block."""
    found = [eigh(block) for block in block_diagonal.blocks(factor)]
    bases = block_diagonal.of_blocks([basis for _, basis in found], factor)
    return torch.cat([values for values, _ in found], dim=-1), bases


def _is_seeded(state: State) -> Tensor:
    """Whether S has been seeded, shape (..., 1, 1)."""
    return state["S"].flatten(-2).any(dim=-1)[..., None, None]
