"""Damping rules: how much is added to the diagonal of a curvature factor.

Every rule maps the two factors of a layer and `ε` to `(ρ_A, ρ_B)`. Under μP, `ρ_A` has to grow with the width like `A`,
and `ρ_B` like `B`. `trace` and `spectral` follow their factor by themselves. `constant` needs the multipliers of
`hf_so2.mup.rules`. `trace_mean` does not scale correctly; it is kept as a counterexample.

Sources: the trace rule is the rescaled damping of Ishikawa & Karakida 2023 (arXiv 2312.12226, section 4.2). `pi` is the
factored Tikhonov damping of Martens & Grosse 2015 (arXiv 1503.05671, section 6.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_so2.linalg import block_diagonal, largest_eigenvalue, trace

Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Damping:
    """A damping rule with its strength. Call it with the factors of a layer to get `(ρ_A, ρ_B)`.

    Args:
        rule: a key of `RULES`.
        epsilon: ε ≥ 0. It is relative to the factor, except in `pi` and `constant`, where it has the factors' units.
        multiplier_a: width multiplier of `ρ_A` under `constant`.
        multiplier_b: width multiplier of `ρ_B` under `constant`.
        multiplier: width multiplier of a single ρ on the curvature itself, under `constant`.
        multiplier_pi: multiplier of ε under `pi`, for the depth and for factors that weights carry; no width.
        head: the damping of the head's two factors, if a weight is both embedding and head.
    """

    rule: str
    epsilon: float
    multiplier_a: float = 1.0
    multiplier_b: float = 1.0
    multiplier: float = 1.0
    multiplier_pi: float = 1.0
    head: Damping | None = None

    def scaled(self, factor: float) -> Damping:
        """The same damping with `factor` times the strength."""
        head = self.head and self.head.scaled(factor)
        return replace(self, epsilon=self.epsilon * factor, head=head)

    def __call__(self, factor_a: Tensor, factor_b: Tensor) -> tuple[Tensor, Tensor]:
        """`(ρ_A, ρ_B)`, shape (...), for factors of shape (..., fan_in, fan_in) and (..., fan_out, fan_out).

        Each block of a block-diagonal factor is damped by itself. ρ then has the shape (..., blocks).

        A factor may be a diagonal, given as a vector. Each entry belongs to a single row, of which a vocabulary has
        thousands. `trace` is therefore relative to the mean of the entries, not to their sum.

        A factor that is exactly zero holds no information (a LoRA `A` before its `B` has moved). The same holds for a
        factor so small that the inverse of ρ leaves the range of its dtype (gradients near 1e-18 in float32). Both get
        ρ = 1, which makes their side of the preconditioner the identity.

        Raises:
            DecompositionError: under `spectral`, a factor has no eigenvalues.
        """
        rho_a, rho_b = RULES[self.rule].factored(self, factor_a, factor_b)
        return _one_if_vanishing(_any(factor_a), rho_a), _one_if_vanishing(_any(factor_b), rho_b)

    def single(self, s: Tensor, per_row: str = "") -> Tensor:
        """ρ, shape (...), for a curvature whose diagonal in its own basis is `s`. It is 1 if `s` vanishes.

        Args:
            s: the diagonal, of shape (..., fan_out, fan_in).
            per_row: the sides, of "A" and "B", that are damped row by row: factors that are diagonals.
        """
        rows = (s.shape[-2] if "B" in per_row else 1) * (s.shape[-1] if "A" in per_row else 1)
        return _one_if_vanishing(s.flatten(-2).any(dim=-1), RULES[self.rule].single(self, s, rows))


def _one_if_vanishing(holds_something: Tensor, rho: Tensor) -> Tensor:
    # A ρ that is NaN stays NaN: the refresh has to notice it.
    vanishing = ~holds_something | (rho < torch.finfo(rho.dtype).tiny)
    return torch.where(vanishing, torch.ones_like(rho), rho)


def _diagonal(factor: Tensor) -> Tensor:
    """The diagonal of each factor. A vector is its own diagonal."""
    return factor if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1)


def _of_blocks(factor: Tensor, of_diagonal: Measure, of_matrix: Measure) -> Tensor:
    """A number for the whole factor, shape (...), or one for each of its blocks, (..., blocks)."""
    return of_diagonal(factor) if factor.ndim == 1 else block_diagonal.measure(of_matrix, factor)


def _any(factor: Tensor) -> Tensor:
    return _of_blocks(factor, lambda x: x.any(), lambda x: _diagonal(x).any(dim=-1))


def _mean(factor: Tensor) -> Tensor:
    return _of_blocks(factor, lambda x: x.mean(), lambda x: _diagonal(x).mean(dim=-1))


def _trace(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rho_a, rho_b = (damping.epsilon * _of_blocks(x, lambda x: x.mean(), trace) for x in (a, b))
    return rho_a, rho_b


def _trace_mean(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return damping.epsilon * _mean(a), damping.epsilon * _mean(b)


def _spectral(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rho_a, rho_b = (damping.epsilon * _of_blocks(x, lambda x: x.max(), largest_eigenvalue) for x in (a, b))
    return rho_a, rho_b


def _pi(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # π compares the whole sides, even if they are cut into blocks.
    mean_a, mean_b = (_diagonal(x).mean(dim=-1) if _is_one(x) else trace(x) / x.shape[-2] for x in (a, b))
    ratio = torch.sqrt(mean_a / mean_b)
    # A zero factor leaves π undefined. π = 1 splits the damping evenly, as for equal factors.
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
    root = (damping.epsilon * damping.multiplier_pi) ** 0.5
    rho_a, rho_b = ratio * root, root / ratio
    return _for_each_block(rho_a, a), _for_each_block(rho_b, b)


def _constant(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.full_like(_mean(a), damping.epsilon * damping.multiplier_a),
        torch.full_like(_mean(b), damping.epsilon * damping.multiplier_b),
    )


def _is_one(factor: Tensor) -> bool:
    return factor.ndim == 1 or not block_diagonal.is_cut(factor)


def _for_each_block(rho: Tensor, factor: Tensor) -> Tensor:
    return rho if _is_one(factor) else rho.unsqueeze(-1).expand(*rho.shape, len(block_diagonal.blocks(factor)))


@dataclass(frozen=True)
class Rule:
    """One damping rule in its two forms.

    Args:
        factored: `(ρ_A, ρ_B)` for a pair of factors.
        single: ρ for a curvature that is diagonal in some basis, given its diagonal S and the number of rows of S that
            are damped one by one.
        is_relative: whether ρ is ε times a size of the matrix that it is added to.
    """

    factored: Callable[[Damping, Tensor, Tensor], tuple[Tensor, Tensor]]
    single: Callable[[Damping, Tensor, int], Tensor]
    is_relative: bool = False


RULES: dict[str, Rule] = {
    "trace": Rule(_trace, lambda damping, s, rows: damping.epsilon * s.sum(dim=(-2, -1)) / rows, is_relative=True),
    "trace_mean": Rule(_trace_mean, lambda damping, s, rows: damping.epsilon * s.mean(dim=(-2, -1)), is_relative=True),
    "spectral": Rule(_spectral, lambda damping, s, rows: damping.epsilon * s.amax(dim=(-2, -1)), is_relative=True),
    # The two sides of π's split always multiply to ε. If there is nothing to split, ρ is ε itself.
    "pi": Rule(_pi, lambda damping, s, rows: s.new_full(s.shape[:-2], damping.epsilon * damping.multiplier_pi)),
    "constant": Rule(_constant, lambda d, s, rows: s.new_full(s.shape[:-2], d.epsilon * d.multiplier)),
}
