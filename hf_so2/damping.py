"""Damping rules: how much is added to the diagonal of a curvature factor.

Every rule maps the two factors of a layer and `ε` to `(ρ_A, ρ_B)`. Under μP, `ρ_A` has to grow like `A` and `ρ_B` like
`B` with the width. `trace` and `spectral` follow their factor by themselves, `constant` needs the multipliers of
`hf_so2.mup.rules`, `trace_mean` does not scale right and is kept to show so.

Sources: the trace rule is the rescaled damping of Ishikawa & Karakida 2023 (arXiv 2312.12226, section 4.2); `pi` is
factored Tikhonov damping, Martens & Grosse 2015 (arXiv 1503.05671, section 6.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.linalg import largest_eigenvalue


@dataclass(frozen=True)
class Damping:
    """A rule with its strength: call it with the factors of a layer to get `(ρ_A, ρ_B)`.

    Args:
        rule: a key of `RULES`.
        epsilon: ε ≥ 0; relative to the factor, except in `pi` and `constant`, where it has the factors' own units.
        multiplier_a: width multiplier of `ρ_A` under `constant`.
        multiplier_b: width multiplier of `ρ_B` under `constant`.
        multiplier: width multiplier under `constant` of a single ρ on the curvature itself.
    """

    rule: str
    epsilon: float
    multiplier_a: float = 1.0
    multiplier_b: float = 1.0
    multiplier: float = 1.0

    def __call__(self, factor_a: Tensor, factor_b: Tensor) -> tuple[Tensor, Tensor]:
        """`(ρ_A, ρ_B)`, 0-dim tensors, for factors of shape (fan_in, fan_in) and (fan_out, fan_out).

        A factor that is exactly zero holds no information (a LoRA `A` before its `B` has moved), and of one so small
        that the inverse of ρ leaves the range of its dtype (gradients near 1e-18 in float32) none is left. It is given
        ρ = 1, which makes its side of the preconditioner the identity.

        Raises:
            DecompositionError: under `spectral`, a factor that has no eigenvalues.
        """
        rho_a, rho_b = RULES[self.rule].factored(self, factor_a, factor_b)
        return _one_if_vanishing(factor_a.diagonal(), rho_a), _one_if_vanishing(factor_b.diagonal(), rho_b)

    def single(self, diagonal: Tensor) -> Tensor:
        """ρ, 0-dim, for a curvature that is `diagonal`, of any shape, in its own basis; 1 for a vanishing one."""
        return _one_if_vanishing(diagonal, RULES[self.rule].single(self, diagonal))


def _one_if_vanishing(diagonal: Tensor, rho: Tensor) -> Tensor:
    # A ρ that is not a number passes: the refresh has to notice it.
    vanishing = ~diagonal.any() | (rho < torch.finfo(rho.dtype).tiny)
    return torch.where(vanishing, torch.ones_like(rho), rho)


def _trace(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return damping.epsilon * a.trace(), damping.epsilon * b.trace()


def _trace_mean(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return damping.epsilon * a.diagonal().mean(), damping.epsilon * b.diagonal().mean()


def _spectral(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return damping.epsilon * largest_eigenvalue(a), damping.epsilon * largest_eigenvalue(b)


def _pi(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    mean_a, mean_b = a.diagonal().mean(), b.diagonal().mean()
    ratio = torch.sqrt(mean_a / mean_b)
    # A zero factor leaves π undefined; 1 splits the damping evenly, as if the factors were alike.
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
    return ratio * damping.epsilon**0.5, damping.epsilon**0.5 / ratio


def _constant(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_tensor(damping.epsilon * damping.multiplier_a), b.new_tensor(damping.epsilon * damping.multiplier_b)


@dataclass(frozen=True)
class Rule:
    """One damping rule in its two forms.

    Args:
        factored: `(ρ_A, ρ_B)` for a pair of factors.
        single: ρ for a curvature that is diagonal in some basis, given its diagonal S.
    """

    factored: Callable[[Damping, Tensor, Tensor], tuple[Tensor, Tensor]]
    single: Callable[[Damping, Tensor], Tensor]


RULES: dict[str, Rule] = {
    "trace": Rule(_trace, lambda damping, s: damping.epsilon * s.sum()),
    "trace_mean": Rule(_trace_mean, lambda damping, s: damping.epsilon * s.mean()),
    "spectral": Rule(_spectral, lambda damping, s: damping.epsilon * s.max()),
    # Both sides of π's split multiply to ε whatever the factors, and ε is what is left where nothing is to be split.
    "pi": Rule(_pi, lambda damping, s: s.new_tensor(damping.epsilon)),
    "constant": Rule(_constant, lambda damping, s: s.new_tensor(damping.epsilon * damping.multiplier)),
}
