"""A weight that is tied between token embedding and output head: a sum of two Kronecker products, inverted exactly.

The embedding's block is `B_e ⊗ diag(a_e)`: `B_e` is the second moment of its output gradients, and `a_e` the
frequencies of the tokens. The head `u = Wᵀ h` uses the transposed matrix. Its *inputs* are thus on the side of the
embedding's outputs. Its block is `A_h ⊗ diag(b_h)`, where `b_h` are the squared gradients of the logits. The products
of one end's gradient with the other's are left out, as for any weight that a loss uses in two places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import CurvatureBlock, State, TokenBlock, corrected_average
from hf_so2.curvature.kfac import KFAC
from hf_so2.curvature.parts import costs, spectrum
from hf_so2.curvature.parts.forms import from_left, from_right
from hf_so2.damping import Damping
from hf_so2.linalg import common_basis

EMBEDDING, HEAD = "", "head_"
"""How the names of each end's tensors begin."""

# Which side of each end lies along the vocabulary, and which along the hidden dimension.
_SIDES = {EMBEDDING: ("A", "B"), HEAD: ("B", "A")}


@dataclass(frozen=True)
class Tied(CurvatureBlock):
    """`P(G) = F^-1 G` for `F = (B_e + ρ) ⊗ diag(a_e + ρ) + (A_h + ρ) ⊗ diag(b_h + ρ)`. Each factor has its own ρ.

    F is the sum of the two damped blocks that K-FAC would give to the ends as separate weights. Both are diagonal over
    the vocabulary. Token `j` thus has its own block `a_j K_e + b_j K_h` over the hidden dimensions, with `a` and `b`
    relative to their means. One basis T makes all these blocks diagonal: with `Tᵀ (K_e + K_h) T = I` and
    `Tᵀ K_h T = diag(μ)`, `P(G) = T [(Tᵀ G)_ij / (a_j (1 - μ_i) + b_j μ_i)]`, exactly. μ_i is the head's share of an
    average token's block in direction i.

    Under μP both products scale equally with the width, wherever the factor on a tied head's logits is applied. Damping
    that is relative to the factors (`trace`, `spectral`) scales in the same way.

    An exponent other than 1 has no such form, since T is not orthonormal. The corrections of EKFAC and TKFAC have none
    either, since they apply to a single Kronecker product. The whole K-FAC family therefore uses this block.

    The matrix is that of the embedding, (hidden, vocabulary). An end adds nothing if no token has reached it or its
    gradients are zero. If both ends add nothing, the block is the identity.

    State: the embedding's averages `A` (vocabulary,), `B` (hidden, hidden) with their `weight`, and the head's
    `head_A` (hidden, hidden), `head_B` (vocabulary,) with `head_weight`; `common_basis` (hidden, hidden), T; `share`
    (hidden,), μ; `rows` and `head_rows` (vocabulary,), the damped `a` and `b` relative to their means.

    Args:
        beta: decay of the running averages, in [0, 1).
        uniform_head: whether the head has one curvature for all its outputs: the mean of `b_h`. This is the multiple of
            the identity that is closest to `diag(b_h)`. An untied head uses the identity itself. Here this would be
            wrong: the identity has no unit, and in a sum the units decide which of the two ends dominates.
    """

    beta: float
    uniform_head: bool = False

    @property
    def ends(self) -> Mapping[str, TokenBlock]:
        """Embedding and head as separate blocks, for their statistics, by the prefix of their names."""
        return {EMBEDDING: KFAC(self.beta, diagonal="A"), HEAD: KFAC(self.beta, diagonal="B")}

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        hidden, vocabulary = shape
        sizes: dict[str, tuple[int, ...]] = {"share": (hidden,), "common_basis": (hidden, hidden)}
        for prefix, (along_vocabulary, along_hidden) in _SIDES.items():
            sizes |= {f"{prefix}weight": (), f"{prefix}rows": (vocabulary,)}
            sizes |= {prefix + along_vocabulary: (vocabulary,), prefix + along_hidden: (hidden, hidden)}
        return {name: torch.zeros(size, device=device, dtype=dtype) for name, size in sizes.items()}

    def update(self, state: State, observation: State) -> None:
        for prefix, end in self.ends.items():
            seen = {name: observation[prefix + name] for name in end.statistics if prefix + name in observation}
            if seen:
                end.update(of_end(state, prefix), seen)

    def factors(self, state: State) -> dict[str, Tensor]:
        """The factors of each end that adds to the block: `A`, `B`, `head_A`, `head_B`."""
        heard = [prefix for prefix in self.ends if bool(state[f"{prefix}B"].any())]
        found = {prefix + side: corrected_average(of_end(state, prefix), side) for prefix in heard for side in "AB"}
        if self.uniform_head and HEAD in heard:
            found["head_B"] = found["head_B"].mean().expand_as(found["head_B"])
        return found

    def damped_factors(self, state: State, damping: Damping) -> dict[str, tuple[Tensor, Tensor]]:
        """The same, each with its ρ. The embedding uses `damping`, and the head uses `damping.head` if there is one."""
        factors = self.factors(state)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for prefix, rule in ((EMBEDDING, damping), (HEAD, damping.head or damping)):
            if f"{prefix}A" in factors:
                a, b = factors[f"{prefix}A"], factors[f"{prefix}B"]
                rho_a, rho_b = rule(a, b)
                found |= {f"{prefix}A": (a, rho_a), f"{prefix}B": (b, rho_b)}
        return found

    def mean_blocks(self, state: State, damping: Damping) -> dict[str, tuple[Tensor, Tensor]]:
        """By end: the damped block of an average token, (hidden, hidden), and each token's multiple of it."""
        damped = self.damped_factors(state, damping)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for prefix, (along_vocabulary, along_hidden) in _SIDES.items():
            if prefix + along_hidden in damped:
                (diagonal, rho), (matrix, rho_hidden) = damped[prefix + along_vocabulary], damped[prefix + along_hidden]
                rows = diagonal + rho
                full = matrix + rho_hidden * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
                found[prefix] = rows.mean() * full, rows / rows.mean()
        return found

    def refresh(self, state: State, damping: Damping) -> None:
        blocks = self.mean_blocks(state, damping)
        nothing, ones = torch.zeros_like(state["common_basis"]), torch.ones_like(state["rows"])
        (embedding, rows), (head, head_rows) = (blocks.get(prefix, (nothing, ones)) for prefix in (EMBEDDING, HEAD))
        limits = torch.finfo(ones.dtype)
        if bool((embedding + head).trace() < limits.tiny / limits.eps):
            basis, share = torch.eye(len(nothing)).to(nothing), torch.zeros_like(state["share"])
        else:
            basis, share = common_basis(head, embedding + head)
        fresh = {"common_basis": basis, "share": share, "rows": rows, "head_rows": head_rows}
        for name in self.refreshed:
            state[name].copy_(fresh[name])

    @property
    def refreshed(self) -> list[str]:
        return ["common_basis", "share", "rows", "head_rows"]

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        basis, share = state["common_basis"], state["share"].unsqueeze(1)
        return basis @ ((basis.mT @ gradient) / torch.lerp(state["rows"], state["head_rows"], share))

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for side, (factor, rho) in self.damped_factors(state, damping).items():
            found |= {f"trace_{side}": spectrum.trace(factor), f"damping_{side}": rho}
        blocks = [mean for mean, _ in self.mean_blocks(state, damping).values()]
        if blocks:
            # The basis whitens the average token's block. Its norm is that of the root of this block's inverse.
            inverse_norm = spectrum.norm(state["common_basis"]).square()
            found["condition"] = (spectrum.norm(torch.stack(blocks).sum(dim=0)) * inverse_norm).clamp(min=1)
        return found

    def refresh_flops(self, shape: costs.Shape) -> float:
        return costs.of_roots(self, shape)

    def precondition_flops(self, shape: costs.Shape) -> float:
        return costs.of_preconditioning(self, shape)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return costs.of_tokens(self, shape, tokens)

    def curvature_along(self, state: State, change: Tensor) -> Tensor:
        """`<Δ, F Δ>`, where F is the sum of both ends' Kronecker products."""
        factors = self.factors(state)
        pairs = [(factors.get(hidden), factors.get(rows)) for hidden, rows in (("B", "A"), ("head_A", "head_B"))]
        images = [from_right(from_left(hidden, change), rows) for hidden, rows in pairs if hidden is not None]
        return (change * sum(images, torch.zeros_like(change))).sum()

    @property
    def models_the_loss(self) -> bool:
        return True


def of_end(state: State, prefix: str) -> State:
    """The tensors of one end, by the names that they have in the end's own block."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
