"""Coordinate descent over hyperparameters: the same care for every optimizer at a fraction of a full grid's runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_so2.errors import ConfigurationError

Position = Mapping[str, int]
"""How many rungs from its start every hyperparameter stands."""


@dataclass(frozen=True)
class Ladder:
    """The values `start · factor**k` of one hyperparameter, without ends.

    Args:
        start: the value to begin with, positive.
        factor: from one rung to the next, above 1.
    """

    start: float
    factor: float

    def value(self, rung: int) -> str:
        """The value on a rung, as a flag; the same rung always gives the same text."""
        return f"{self.start * self.factor**rung:.6g}"


def values_at(ladders: Mapping[str, Ladder], position: Position) -> dict[str, str]:
    """The hyperparameters at a position, as flags."""
    return {name: ladder.value(position[name]) for name, ladder in ladders.items()}


def parse_ladder(text: str) -> tuple[str, Ladder]:
    """`"learning_rate=0.06*2"` as a name and a ladder that starts at 0.06 and doubles.

    Raises:
        ConfigurationError: the text has no name, start or factor, or they are out of range.
    """
    name, _, values = text.partition("=")
    start, _, factor = values.partition("*")
    try:
        ladder = Ladder(float(start), float(factor))
    except ValueError:
        ladder = Ladder(0.0, 0.0)
    if not name or not (0 < ladder.start < math.inf and 1 < ladder.factor < math.inf):
        raise ConfigurationError("descend", text, "must be name=start*factor with start > 0 and factor > 1")
    return name, ladder


def descend(
    names: Sequence[str], losses_of: Callable[[Sequence[Position]], Sequence[float]], tolerance: float = 0.0
) -> Position:
    """The position from which no single hyperparameter, moved by one rung, lowers the loss by more than `tolerance`.

    Walks one hyperparameter at a time, in the better direction for as long as that pays, and goes round until none
    moves. Both neighbours on every axis have been tried in the end, so no optimum lies on an edge.

    Args:
        names: the hyperparameters, in the order in which they are walked.
        losses_of: the losses at some positions, infinite where training diverged; asked again for the same position it
            answers the same.
        tolerance: what the loss must fall by for a move to count; below the noise a walk would follow the noise.

    Raises:
        ConfigurationError: training diverged at the start.
    """
    best: dict[str, int] = dict.fromkeys(names, 0)
    (lowest,) = losses_of([best])
    if not math.isfinite(lowest):
        raise ConfigurationError("descend", ", ".join(names), "training diverged at the start; start elsewhere")
    settled = 0
    for name in itertools.cycle(names):
        if settled == len(names):
            return best
        beside = [{**best, name: best[name] + step} for step in (-1, 1)]
        losses = losses_of(beside)
        step = -1 if losses[0] < losses[1] else 1
        found, moved = min(losses), False
        while found < lowest - tolerance:
            best, lowest, moved = {**best, name: best[name] + step}, found, True
            (found,) = losses_of([{**best, name: best[name] + step}])
        settled = 1 if moved else settled + 1
    raise AssertionError("names is empty")
