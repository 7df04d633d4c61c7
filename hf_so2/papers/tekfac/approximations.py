"""How far K-FAC, EKFAC, TKFAC and TEKFAC are from the Fisher block that they approximate.

The dense block of a layer is made of the gradients `δ hᵀ` of single examples; the approximations are what the package's
own blocks make of the same examples. vec stacks rows, so that a Kronecker block is `B ⊗ A`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_so2.curvature import EKFAC, KFAC, TEKFAC, TKFAC, TokenBlock
from hf_so2.damping import Damping

METHODS: Mapping[str, TokenBlock] = {
    "K-FAC": KFAC(beta=0.0),
    "EKFAC": EKFAC(beta=0.0),
    "TKFAC": TKFAC(beta=0.0),
    "TEKFAC": TEKFAC(beta=0.0),
}
_ANY_DAMPING = Damping("trace", 1e-3)  # refreshing asks for one; what is compared is undamped


@dataclass(frozen=True)
class Rows:
    """The examples of one layer: `h` (N, fan_in) and `δ` (N, fan_out) of each example's own loss."""

    h: Tensor
    delta: Tensor

    @property
    def fisher(self) -> Tensor:
        """`(1/N) Σ vec(δ hᵀ) vec(δ hᵀ)ᵀ`, (fan_out · fan_in,) squared."""
        vectors = torch.einsum("no,ni->noi", self.delta, self.h).flatten(1)
        return vectors.mT @ vectors / len(vectors)


def rows_of(model: nn.Sequential, images: Tensor, generator: torch.Generator) -> list[Rows]:
    """Inputs and output gradients of every linear layer, labels drawn from the model's own predictions."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    x = images
    for module in model:
        result = module(x)
        if isinstance(module, nn.Linear):
            inputs.append(x)
            outputs.append(result)
        x = result
    labels = torch.multinomial(x.detach().softmax(dim=1), 1, generator=generator).squeeze(1)
    loss_sum = nn.functional.cross_entropy(x, labels, reduction="sum")
    deltas = torch.autograd.grad(loss_sum, outputs)
    return [Rows(h.detach(), delta) for h, delta in zip(inputs, deltas, strict=True)]


def fitted(block: TokenBlock, first: Rows, then: Rows | None = None) -> dict[str, Tensor]:
    """The state of a block after it has seen some rows; a basis is built of `first`, averages are of `then`.

    The averages keep nothing (β = 0), so that `then`, by default the same rows, is all that they are of.
    """
    shape = first.delta.shape[1], first.h.shape[1]
    state = block.init_state(shape, first.h.device, first.h.dtype)
    # Twice: the first refresh builds the eigenbases, and only then is there something to measure moments in.
    for rows, refreshes in ((first, True), (then or first, then is None)):
        sums = block.observe(state, rows.h, rows.delta)
        block.update(state, {name: value / len(rows.h) for name, value in sums.items()})
        if refreshes:
            block.refresh(state, _ANY_DAMPING)
    return state


def dense(name: str, state: Mapping[str, Tensor]) -> Tensor:
    """The undamped matrix that a state stands for, (fan_out · fan_in,) squared."""
    if "S" in state:
        basis = torch.kron(state["B_basis"], state["A_basis"])
        return (basis * state["S"].flatten()) @ basis.mT
    average = {key: state[key] / state["weight"] for key in ("A", "B", "tau") if key in state}
    product = torch.kron(average["B"], average["A"])
    return product / average["tau"] if name == "TKFAC" else product


def error(approximation: Tensor, fisher: Tensor) -> float:
    """`‖F̃ - F‖ / ‖F‖`, Frobenius."""
    return float((approximation - fisher).norm() / fisher.norm())


def trace_ratio(approximation: Tensor, fisher: Tensor) -> float:
    """`tr F̃ / tr F`."""
    return float(approximation.trace() / fisher.trace())
