"""When statistics are taken and preconditioners are rebuilt: pure functions of the step number and the layers' costs.

A job that is due once in `every` steps has a turn: its place among these steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# The first statistics are the noisiest, and the loss moves fastest in the first steps. A preconditioner that is kept
# from step 1 until the first regular refresh costs more loss than these refreshes cost time.
EARLY_STEPS = frozenset({1, 2, 4, 7})

# After them a layer waits half as long as training has taken, until that is the interval: 20 steps are an age at step
# 10 and nothing at step 1,000 (docs/speed.md has losses).
GROWTH = 1.5


def due(step: int, every: int, turn: int = 0) -> bool:
    """Whether a job that is done every `every` steps is due at step `step`. Every job is due at the `EARLY_STEPS`.

    Args:
        step: number of the step, counted from 1.
        every: the interval, in steps.
        turn: the job's turn, in [0, every): it is due where `step % every == turn`.
    """
    return step in EARLY_STEPS or step % every == turn


def refresh_due(step: int, every: int, turn: int = 0) -> bool:
    """Whether a preconditioner is rebuilt at step `step`.

    All are at the `EARLY_STEPS`. Then a layer's next refresh is at `GROWTH` times the step of its last, until refreshes
    are `every` steps apart. From then on they are due as in `due`.

    Args:
        step: number of the step, counted from 1.
        every: the interval, in steps.
        turn: the layer's turn, in [0, every). It spreads refreshes over steps early, too.
    """
    if step <= max(EARLY_STEPS):
        return due(step, every, turn)
    return math.floor(_intervals(step, every, turn)) > math.floor(_intervals(step - 1, every, turn))


def regular_from(every: int) -> float:
    """The step at which intervals between refreshes, which grow with the step, have grown to `every`."""
    return every / math.log(GROWTH)


def _intervals(step: int, every: int, turn: int) -> float:
    """How many intervals have passed: `(step - turn) / every`, continued to where intervals grow with the step."""
    regular = regular_from(every)
    passed = step if step >= regular else regular * (1 + math.log(step / regular))
    # Rounded, since logarithms may differ in the last bit from machine to machine.
    return round((passed - turn) / every, 9)


def turns(costs: Mapping[str, float], every: int) -> dict[str, int]:
    """The turn of each job. The turns give every step about the same share of the work.

    Jobs are sorted by descending cost and cut into `every` runs of equal total cost. A step has at most one job more
    than its share. `hf_so2.distributed.assign` deals jobs to ranks in the same order, so that the jobs of one run go to
    all ranks in turn.

    Args:
        costs: cost of each job by name, ≥ 0, in any unit.
        every: number of turns, at least 1.

    Returns:
        The turns, in the order of `costs`. The name breaks ties. The turns thus depend neither on the order of `costs`
        nor on the number of ranks.
    """
    total, before = sum(costs.values()), 0.0
    found = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        # Round-off may put the last job one turn too far.
        found[name] = min(int(before / total * every), every - 1) if total else 0
        before += costs[name]
    return {name: found[name] for name in costs}


def layer_turns(costs: Mapping[str, float], every: int, refresh_every: int) -> tuple[dict[str, int], dict[str, int]]:
    """The turns of all layers: of their statistics, and of their refreshes.

    The layers of a transformer block, see `block_of`, have one turn of statistics. Layers that read the same tensor are
    then captured together: they share its sums, and decide together which positions count (`hf_so2.layers.rows`).

    If `every` divides `refresh_every`, a layer's statistics are updated at every step of its regular refreshes, and at
    equal intervals in between. Each of these refreshes thus sees new statistics.

    Args:
        costs: cost of each layer's refresh, by name of the weight.
        every: steps between updates of the statistics.
        refresh_every: steps between refreshes.
    """
    of_blocks: dict[str, float] = {}
    for name, cost in costs.items():
        of_blocks[block_of(name)] = of_blocks.get(block_of(name), 0.0) + cost
    block_turns = turns(of_blocks, every)
    statistics = {name: block_turns[block_of(name)] for name in costs}
    if refresh_every % every:
        return statistics, turns(costs, refresh_every)
    refreshes: dict[str, int] = {}
    for turn in range(every):
        together = {name: costs[name] for name in costs if statistics[name] == turn}
        rounds = turns(together, refresh_every // every)
        refreshes |= {name: number * every + turn for name, number in rounds.items()}
    return statistics, {name: refreshes[name] for name in costs}


def block_of(name: str) -> str:
    """The part of a model that a weight belongs to: up to the last number in its name (`model.layers.3`), or, in names
    without one, its module's parent."""
    *path, _ = name.split(".")
    numbered = [index for index, part in enumerate(path) if part.isdigit()]
    return ".".join(path[: numbered[-1] + 1] if numbered else path[:-1])
