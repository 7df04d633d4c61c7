"""When statistics are taken and preconditioners rebuilt: pure functions of the step number and of what layers cost."""

from __future__ import annotations

from collections.abc import Mapping

# The first statistics are the noisiest and the loss moves fastest: a preconditioner kept from step 1 until the first
# regular refresh costs more loss than these refreshes cost time.
EARLY_STEPS = frozenset({1, 2, 4, 7})


def due(step: int, every: int, turn: int = 0) -> bool:
    """Whether work done every `every` steps is due at step number `step`, counted from 1.

    Args:
        step: its number.
        every: how many steps lie between.
        turn: at which step of each `every` it is, in [0, every).
    """
    return step in EARLY_STEPS or step % every == turn


def turns(costs: Mapping[str, float], every: int) -> dict[str, int]:
    """The turn of each job, such that every step has about the same share of all work, and none a spike.

    Jobs are put in descending order of cost and cut into runs of `1/every` of the total each, so that a step has at
    most one job more than its share. `hf_so2.distributed.assign` deals jobs to ranks in the same order: those of one
    run go round all ranks.

    Args:
        costs: cost of each job by name, ≥ 0, in any unit.
        every: how many turns there are, at least 1.

    Returns:
        The turns, in the order of `costs`. Ties are broken by name, so that neither the order nor the number of ranks
        matters.
    """
    total, before = sum(costs.values()), 0.0
    found = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        # Round-off may take the last of them one turn too far.
        found[name] = min(int(before / total * every), every - 1) if total else 0
        before += costs[name]
    return {name: found[name] for name in costs}


def statistics_turns(costs: Mapping[str, float], every: int, refresh_every: int) -> dict[str, int]:
    """The turn of each layer's statistics: at the steps of its refreshes, which so see the newest, and evenly between.

    Where one interval does not divide the other, turns are spread as those of refreshes are. Layers that read the same
    tensor may get different turns, and then do not share the sums of it: in Llamas of 4 to 16 layers that is 1.5 % more
    FLOPs at most. If they took one turn together, being among the largest layers, the longest step would mostly be
    longer, by up to 30 %.

    Args:
        costs: of each layer's refresh, by name.
        every: steps between updates of the statistics.
        refresh_every: steps between refreshes, whose turns are `turns(costs, refresh_every)`.
    """
    if refresh_every % every:
        return turns(costs, every)
    return {name: turn % every for name, turn in turns(costs, refresh_every).items()}
