"""Which rank refreshes which layer: a pure function, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping


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
    loads = [0.0] * ranks
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += costs[name]
        owner[name] = rank
    return {name: owner[name] for name in costs}
