"""Which rank refreshes and which ranks hold which layer: pure functions, with the same result on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass


def assign(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Spread jobs over ranks by longest processing time first (Graham 1969): largest job to the least loaded rank.

    The heaviest rank carries at most 4/3 - 1/(3·ranks) of the best possible maximum.

    Args:
        costs: cost of each job by name, in any unit.
        ranks: number of ranks, at least 1.

    Returns:
        The rank of each job, in the order of `costs`. Ties are broken by name and by rank, so that every rank that
        calls this with the same costs gets the same answer.
    """
    loads = [(0.0, rank) for rank in range(ranks)]  # a heap as it stands
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[name], rank))
        owner[name] = rank
    return {name: owner[name] for name in costs}


@dataclass(frozen=True)
class Grid:
    """Ranks in rows and columns (Pauloski et al. 2021, arXiv 2107.01739): a layer is held by the ranks of one column.

    Rank r is in row `r // columns` and column `r % columns`. A layer's fresh preconditioner goes down its column at
    every refresh; its preconditioned gradient goes along every row, from the one rank there that holds the layer, at
    every step. A row's ranks are neighbours, as far as possible on one machine, since that is the more frequent way.

    Args:
        ranks: how many there are, ≥ 1.
        workers: how many of them hold a layer, KAISA's gradient workers: a divisor of `ranks`.
    """

    ranks: int
    workers: int

    @classmethod
    def of_fraction(cls, fraction: float, ranks: int) -> Grid:
        """With `⌈fraction · ranks⌉` workers, or the next larger number that divides `ranks`; at least one."""
        # A third of three ranks is one, whatever 0.33333333 times 3 rounds to.
        wanted = max(1, math.ceil(fraction * ranks - 1e-6))
        return cls(ranks, next(workers for workers in range(wanted, ranks + 1) if ranks % workers == 0))

    @property
    def columns(self) -> int:
        return self.ranks // self.workers

    def row_of(self, rank: int) -> int:
        return rank // self.columns

    def column_of(self, rank: int) -> int:
        return rank % self.columns

    def row(self, index: int) -> list[int]:
        """The ranks of a row, one of each column in their order."""
        return list(range(index * self.columns, (index + 1) * self.columns))

    def column(self, index: int) -> list[int]:
        """The ranks of a column, one of each row in their order."""
        return list(range(index, self.ranks, self.columns))


@dataclass(frozen=True)
class Cost:
    """What a layer costs per step, in one unit.

    Args:
        refresh: of rebuilding its preconditioner, on the one rank that does.
        held: of what each rank that holds it does at every step: preconditioning above all.
    """

    refresh: float
    held: float


def place(costs: Mapping[str, Cost], grid: Grid) -> dict[str, int]:
    """The rank that refreshes each layer; the ranks of its column hold the layer.

    Longest processing time first, twice: layers over columns by what they cost each rank of one, then over the ranks of
    a column by what a refresh costs.

    Args:
        costs: by name.
        grid: where the ranks are.

    Returns:
        The owner's rank by name, in the order of `costs`; the same on every rank.
    """
    shares = {name: cost.refresh / grid.workers + cost.held for name, cost in costs.items()}
    columns = assign(shares, grid.columns)
    refreshes: dict[int, dict[str, float]] = {}
    for name, column in columns.items():
        refreshes.setdefault(column, {})[name] = costs[name].refresh
    owners: dict[str, int] = {}
    for column, own in refreshes.items():
        ranks = grid.column(column)
        owners |= {name: ranks[row] for name, row in assign(own, grid.workers).items()}
    return {name: owners[name] for name in costs}
