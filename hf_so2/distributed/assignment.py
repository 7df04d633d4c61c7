"""Which rank refreshes and which ranks hold which layer: pure functions, with the same result on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


def assign(costs: Mapping[str, float], ranks: int, fixed: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """Spread jobs over ranks by longest processing time first (Graham 1969).

    The largest remaining job goes to the least loaded rank. The heaviest load is at most 4/3 - 1/(3·ranks) times the
    best possible maximum.

    Args:
        costs: cost of each job by name, in any unit.
        ranks: number of ranks, at least 1.
        fixed: the ranks of jobs that are placed already. The others are spread around them.

    Returns:
        The rank of each job, in the order of `costs`. Name and rank break ties. Every rank that calls this with the
        same costs thus gets the same answer.
    """
    owner = {name: rank for name, rank in fixed.items() if name in costs}
    loads = [(sum(costs[name] for name, its in owner.items() if its == rank), rank) for rank in range(ranks)]
    heapq.heapify(loads)
    for name in sorted(costs.keys() - owner.keys(), key=lambda name: (-costs[name], name)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[name], rank))
        owner[name] = rank
    return {name: owner[name] for name in costs}


@dataclass(frozen=True)
class Grid:
    """Ranks in rows and columns (Pauloski et al. 2021, arXiv 2107.01739). The ranks of one column hold a layer.

    Rank r is in row `r // columns` and column `r % columns`. At every refresh, a layer's new preconditioner is sent
    down its column. At every step, its preconditioned gradient is sent along every row, from the one rank in the row
    that holds the layer. The second transfer is more frequent, so the ranks of a row are neighbours, if possible on one
    machine.

    Args:
        ranks: number of ranks, ≥ 1.
        workers: number of ranks that hold a layer (KAISA's gradient workers): a divisor of `ranks`.
    """

    ranks: int
    workers: int

    @classmethod
    def of_fraction(cls, fraction: float, ranks: int) -> Grid:
        """The grid with `⌈fraction · ranks⌉` workers, or the next larger number that divides `ranks`; at least one."""
        # The tolerance makes a third of three ranks one rank, whatever 0.33333333 times 3 rounds to.
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
        """The ranks of a row, one of each column, in the order of columns."""
        return list(range(index * self.columns, (index + 1) * self.columns))

    def column(self, index: int) -> list[int]:
        """The ranks of a column, one of each row, in the order of rows."""
        return list(range(index, self.ranks, self.columns))


@dataclass(frozen=True)
class Cost:
    """The cost of a layer per step. Both numbers have the same unit.

    Args:
        refresh: cost of rebuilding its preconditioner, on the owner.
        held: cost of the work at every step on each rank that holds the layer: mainly preconditioning.
    """

    refresh: float
    held: float


def place(costs: Mapping[str, Cost], grid: Grid, homes: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """The rank that refreshes each layer. The ranks of its column hold the layer.

    Longest processing time first is used twice: to spread layers over columns by their cost on each rank of a column,
    and then over the ranks of a column by the cost of a refresh.

    Args:
        costs: costs of each layer, by name.
        grid: the grid of ranks.
        homes: the rank that has all of a layer's weight, for layers of which one rank has. They go to its column.

    Returns:
        The owner's rank by name, in the order of `costs`; the same on every rank.
    """
    shares = {name: cost.refresh / grid.workers + cost.held for name, cost in costs.items()}
    columns = assign(shares, grid.columns, {name: grid.column_of(rank) for name, rank in homes.items()})
    refreshes: dict[int, dict[str, float]] = {}
    for name, column in columns.items():
        refreshes.setdefault(column, {})[name] = costs[name].refresh
    owners: dict[str, int] = {}
    for column, own in refreshes.items():
        ranks = grid.column(column)
        owners |= {name: ranks[row] for name, row in assign(own, grid.workers).items()}
    return {name: owners[name] for name in costs}
