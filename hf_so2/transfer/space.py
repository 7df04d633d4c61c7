"""What a sweep searches: a grid, every point of which is run, or ranges that Optuna samples from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hf_so2.errors import ConfigurationError
from hf_so2.spelling import did_you_mean
from hf_so2.transfer.grid import parse_axis

SEARCHABLE = ("learning_rate", "damping", "fallback_learning_rate", "weight_decay")
STEP = 2.0
"""Ratio of neighbouring learning rates in the grid that is searched when none is given."""

Params = dict[str, float]


@dataclass(frozen=True)
class Space:
    """Either a grid or ranges, by the name of the flag.

    Args:
        grid: values to try, ascending.
        ranges: lowest and highest value; sampled on a logarithmic scale.
    """

    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What is searched."""
        return tuple(self.grid or self.ranges)

    def points(self) -> list[Params]:
        """Every point of the grid, those near its middle first: a search that is cut short has tried what matters."""

        def distance(indices: tuple[int, ...]) -> float:
            middles = ((len(values) - 1) // 2 for values in self.grid.values())
            return sum(abs(index - middle) for index, middle in zip(indices, middles, strict=True))

        indices = itertools.product(*(range(len(values)) for values in self.grid.values()))
        return [
            {name: values[index] for index, (name, values) in zip(chosen, self.grid.items(), strict=True)}
            for chosen in sorted(indices, key=distance)
        ]

    def covering(self, tried: Iterable[Params]) -> Space:
        """The grid with the values that were tried besides: an earlier extension is part of it."""
        tried = list(tried)
        return Space(
            grid={
                name: tuple(sorted({*values, *(params[name] for params in tried if name in params)}))
                for name, values in self.grid.items()
            }
        )

    def extended(self, edges: Iterable[tuple[str, str]]) -> Space:
        """The grid with one more value beyond each of the given edges, (name, `"low"` or `"high"`)."""
        grid = dict(self.grid)
        for name, side in edges:
            grid[name] = tuple(sorted({*grid[name], _beyond(grid[name], side)}))
        return Space(grid=grid)


def _beyond(values: Sequence[float], side: str) -> float:
    """The next value outside `values`, at the ratio of the two at that end; twice or half a single one."""
    end, inner = (values[0], values[1:2]) if side == "low" else (values[-1], values[-2:-1])
    ratio = end / inner[0] if inner and inner[0] > 0 and end > 0 else (1 / STEP if side == "low" else STEP)
    return float(f"{end * ratio:.6g}")


def default_grid(center: float, count: int) -> dict[str, tuple[float, ...]]:
    """`count` learning rates a factor 2 apart around `center`; of an even number one more lies above it."""
    below = (count - 1) // 2
    return {"learning_rate": tuple(float(f"{center * STEP ** (index - below):.6g}") for index in range(count))}


def parse_grid(texts: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """`["learning_rate=0.03,0.06", "damping=1e-4,1e-3"]` as ascending values by name.

    Raises:
        ConfigurationError: a name that cannot be searched or comes twice, no values, or values that are no numbers.
    """
    grid: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, values = parse_axis(text)
        _require_searchable("grid", text, name, grid)
        grid[name] = tuple(sorted({_number("grid", text, value) for value in values}))
    return grid


def parse_ranges(texts: Iterable[str]) -> dict[str, tuple[float, float]]:
    """`["learning_rate=0.01:0.5"]` as (lowest, highest) by name.

    Raises:
        ConfigurationError: as :func:`parse_grid`, or a range that is empty or not of positive numbers.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, bounds = text.partition("=")
        _require_searchable("search", text, name, ranges)
        low, colon, high = bounds.partition(":")
        if not colon:
            raise ConfigurationError("search", text, "must be name=lowest:highest")
        ends = _number("search", text, low), _number("search", text, high)
        if not 0 < ends[0] < ends[1]:
            raise ConfigurationError("search", text, "must go from a positive number to a larger one")
        ranges[name] = ends
    return ranges


def _require_searchable(flag: str, text: str, name: str, known: Mapping[str, object]) -> None:
    if name not in SEARCHABLE:
        hint = did_you_mean(name, SEARCHABLE)
        raise ConfigurationError(flag, text, f"must name one of {', '.join(SEARCHABLE)}{hint}")
    if name in known:
        raise ConfigurationError(flag, text, f"must name {name} only once")


def _number(flag: str, text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigurationError(flag, text, f"must hold numbers, not {value!r}")
    return number
