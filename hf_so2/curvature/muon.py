"""Muon: the averaged gradient with all singular values set to about one (Jordan 2024).

https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon

from hf_so2.curvature.base import GradientBlock, State
from hf_so2.curvature.parts import costs
from hf_so2.damping import Damping
from hf_so2.linalg import largest_entry, per_matrix

COEFFICIENTS = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)


@dataclass(frozen=True)
class Muon(GradientBlock):
    """`P(G) = U Vᵀ` for `G = U Σ Vᵀ`, approximately.

    It uses torch's own Newton-Schulz iteration in bfloat16, which leaves singular values between about 0.7 and 1.2.

    `P(G)` has no factor for the aspect ratio. The caller applies torch's `original` adjustment of the learning rate,
    `√max(1, fan_out/fan_in)`, or the target of the spectral norm control replaces it.

    State: `weight`, 0-dim, 1 once a gradient was seen. Muon averages only the gradient itself.

    Attributes:
        orthogonal: the spectral norm of an update is about 1 already and needs no power iteration.
    """

    orthogonal: ClassVar[bool] = True

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        return {"weight": torch.zeros((), device=device, dtype=dtype)}

    def observe_gradient(self, state: State, gradient: Tensor) -> State:
        return {}

    def update(self, state: State, observation: State) -> None:
        state["weight"].fill_(1)

    def refresh(self, state: State, damping: Damping) -> None:
        """Does nothing: the method keeps no preconditioner."""

    @property
    def refreshed(self) -> list[str]:
        return []

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        # torch divides by the root of a sum of squares, which can leave the range although the gradient does not. It
        # divides by no less than its ε, which would shrink small gradients. So the gradient is scaled first, by a power
        # of two: this changes no bit of the result.
        largest = largest_entry(gradient)
        exponent = torch.frexp(largest).exponent.clamp(-126, 126)
        # `ldexp` of one number: on a whole matrix it takes twenty times as long as a product.
        unit = per_matrix(torch.ldexp(torch.ones_like(largest), -exponent), gradient)
        scaled = torch.mul(gradient, unit, out=torch.empty_like(gradient, dtype=torch.bfloat16))
        if gradient.ndim > 2:
            return _orthogonalized(scaled).to(gradient.dtype)
        orthogonal = torch_muon._zeropower_via_newtonschulz(
            scaled, COEFFICIENTS, torch_muon.DEFAULT_NS_STEPS, torch_muon.EPS
        )
        return orthogonal.to(gradient.dtype)

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        return {}

    def refresh_flops(self, shape: costs.Shape) -> float:
        return 0.0

    def precondition_flops(self, shape: costs.Shape) -> float:
        """Each iteration has two products with the matrix and one of its Gram matrix, on the smaller side."""
        small, large = sorted(shape)
        return torch_muon.DEFAULT_NS_STEPS * costs.PRODUCT * (2 * small**2 * large + small**3)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return 0.0


def _orthogonalized(stack: Tensor) -> Tensor:
    """torch's iteration for a stack of matrices, (..., m, n). torch's own function takes one matrix."""
    x = stack.flatten(end_dim=-3)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch_muon.EPS)
    a, b, c = COEFFICIENTS
    for _ in range(torch_muon.DEFAULT_NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(stack.shape)
