"""Two ways to split a layer's Fisher block into a Kronecker product `F ≈ A ⊗ B` of averages over tokens.

`INDEPENDENT` treats inputs and gradients as independent: `A = E[h hᵀ]`, `B = E[δ δᵀ]` (Martens & Grosse 2015,
arXiv 1503.05671). `TRACE_RESTRICTED` weights each by the size of the other and keeps the trace of the exact block:
`F ≈ τ Φ ⊗ Ψ` with `τ = E[|h|² |δ|²]`, `Φ = E[|δ|² h hᵀ]/τ`, `Ψ = E[|h|² δ δᵀ]/τ` (Gao et al. 2020, arXiv 2011.10741,
equation 11). Here the factors are `A = √τ Φ`, `B = √τ Ψ`.

The sums are additive over rows. The state keeps their running averages under the same names. A factor is a matrix, its
diagonal blocks (`hf_so2.linalg.block_diagonal`), or, on a side of `diagonal`, its diagonal as a vector.

Under `INDEPENDENT`, the `A` of an embedding is the frequencies of its tokens. If `A` is weighted by gradients, it is
not: `TRACE_RESTRICTED_TOKENS` keeps the frequencies as a separate average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_so2.curvature.base import Plan, State, Statistic, corrected_average
from hf_so2.curvature.parts.forms import second_moment, squared_length
from hf_so2.linalg import block_diagonal, per_matrix


class Rows:
    """The rows of a layer as `TokenBlock.observe` takes them, and their squared lengths, which several sums need."""

    def __init__(self, h: Tensor, delta: Tensor, plan: Plan | None) -> None:
        self.h, self.delta, self.plan = h, delta, plan

    @property
    def weights(self) -> Tensor | float:
        """Weights for sums into which gradients do not enter."""
        return 1.0 if self.plan is None or self.plan.weights is None else self.plan.weights

    @cached_property
    def h_squared(self) -> Tensor:
        return squared_length(self.h)

    @cached_property
    def delta_squared(self) -> Tensor:
        return squared_length(self.delta)


@dataclass(frozen=True, eq=False)  # there are three of them
class Moments:
    """One way to split.

    Args:
        statistics: the statistics that are averaged: always `A` (fan_in, fan_in) and `B` (fan_out, fan_out), and in
            some cases `frequencies` (fan_in,) and 0-dim scalars.
        sums: for each statistic, a function from the rows and its average (for the form) to its sum.
        factor: a function from the state to the factor `A` or `B` of `F ≈ A ⊗ B`.
    """

    statistics: Mapping[str, Statistic]
    sums: Mapping[str, Callable[[Rows, Tensor], Tensor]]
    factor: Callable[[State, str], Tensor]

    def init_state(
        self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype, diagonal: str, block_size: int | None
    ) -> State:
        """Zeroed averages and their `weight`.

        Args:
            diagonal: the sides that are kept as vectors.
            block_size: the largest dimension of a block of the other sides; None for one block.
        """
        fan_out, fan_in = shape
        sizes: dict[str, tuple[int, ...]] = {
            side: (dim,) if side in diagonal else (dim, block_diagonal.width_of(dim, block_size))
            for side, dim in (("A", fan_in), ("B", fan_out))
        }
        sizes["frequencies"] = (fan_in,)
        names = ("weight", *self.statistics)
        return {name: torch.zeros(sizes.get(name, ()), device=device, dtype=dtype) for name in names}

    def observe(self, state: State, names: Iterable[str], rows: Rows, known: State) -> State:
        """The sums of these names. Sums in `known` are not computed again. `state` holds their averages."""
        return {name: known[name] if name in known else self.sums[name](rows, state[name]) for name in names}


def _trace_restricted_factor(state: State, name: str) -> Tensor:
    tau, average = corrected_average(state, "tau"), corrected_average(state, name)
    # If every token's h or δ is zero, τ and the factors are zero. A denormal τ has too few digits and counts as zero.
    tau = per_matrix(tau, average)
    return torch.where(tau < torch.finfo(tau.dtype).tiny, torch.zeros_like(average), average / tau.sqrt())


INDEPENDENT = Moments(
    statistics={
        "A": Statistic(gradient_degree=0, per="rows", symmetric=True),
        "B": Statistic(gradient_degree=2, per="tokens", symmetric=True),
    },
    sums={
        "A": lambda rows, like: second_moment(rows.h, like, rows.weights, rows.plan),
        "B": lambda rows, like: second_moment(rows.delta, like, plan=rows.plan),
    },
    factor=corrected_average,
)

TRACE_RESTRICTED = Moments(
    statistics={name: Statistic(2, per="tokens", symmetric=name != "tau") for name in ("A", "B", "tau")},
    sums={
        "A": lambda rows, like: second_moment(rows.h, like, rows.delta_squared, rows.plan),
        "B": lambda rows, like: second_moment(rows.delta, like, rows.h_squared, rows.plan),
        "tau": lambda rows, like: (rows.h_squared * rows.delta_squared).sum(),
    },
    factor=_trace_restricted_factor,
)

TRACE_RESTRICTED_TOKENS = replace(
    TRACE_RESTRICTED,
    statistics={**TRACE_RESTRICTED.statistics, "frequencies": INDEPENDENT.statistics["A"]},
    sums={**TRACE_RESTRICTED.sums, "frequencies": INDEPENDENT.sums["A"]},
)


def trace_restricted(diagonal: str) -> Moments:
    """`TRACE_RESTRICTED`, with the frequencies of tokens if the input side is a diagonal (an embedding)."""
    return TRACE_RESTRICTED_TOKENS if "A" in diagonal else TRACE_RESTRICTED
