"""Where scores over rates or dampings have their least, how far that moves over the width, and power laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from hf_so2.papers.training import FLOOR

Curves: TypeAlias = Mapping[int, Mapping[int, Mapping[int, float]]]
"""Scores (log10 nats) by width, seed and step of the grid (a power of 2 over the value tuned at the base width)."""

REACH = 2  # steps of the grid on either side of the best that the parabola is fitted to


def optimum(curves: Sequence[Mapping[int, float]]) -> tuple[float, bool]:
    """Where the mean of some curves has its least, in steps of the grid, and whether that is on an edge.

    A parabola through the best step and its neighbours, two on either side, by least squares; the best step itself
    where its vertex is more than a step away.
    """
    steps = sorted(curves[0])
    means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
    best = int(np.argmin(means))
    if best in (0, len(steps) - 1):
        return float(steps[best]), True
    near = range(max(0, best - REACH), min(len(steps), best + REACH + 1))
    a, b, _ = np.polyfit([steps[index] - steps[best] for index in near], [means[index] for index in near], 2)
    vertex = -b / (2 * a) if a > 0 else 0.0
    return steps[best] + (float(vertex) if abs(vertex) <= 1 else 0.0), False


def growth(curves: Curves) -> list[float]:
    """log2 of the best value at the widest network over that at the narrowest, as pseudo-values of the seeds.

    Where the widest network's best value is on the edge of the grid it has moved at least so far, and counts as that;
    where the narrowest's is, nothing is known: NaN.
    """
    return jackknife(lambda seeds: _moved(curves, seeds), list(curves[min(curves)]))


def distance(curves: Curves) -> list[float]:
    """The same of its absolute value."""
    return jackknife(lambda seeds: abs(_moved(curves, seeds)), list(curves[min(curves)]))


def _moved(curves: Curves, seeds: Sequence[int]) -> float:
    narrow, wide = curves[min(curves)], curves[max(curves)]
    start, on_edge = optimum([narrow[seed] for seed in seeds])
    return math.nan if on_edge else optimum([wide[seed] for seed in seeds])[0] - start


def jackknife(statistic: Callable[[Sequence[int]], float], seeds: Sequence[int]) -> list[float]:
    """`n θ - (n - 1) θ_(without one)` for every seed (Tukey 1958).

    The mean of these is the statistic of all seeds, less its bias; Student's interval of them is one of the statistic.
    A best value is one: that of the mean curve is known far better than the mean of every seed's own.
    """
    whole, n = statistic(seeds), len(seeds)
    return [n * whole - (n - 1) * statistic([other for other in seeds if other != seed]) for seed in seeds]


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of a power law in the width, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(np.maximum(values, FLOOR)), 1)[0])


def exponents(by_width: Mapping[int, Sequence[float]]) -> list[float]:
    """Of each layer's change, over the widths."""
    return [slope(list(by_width), values) for values in zip(*by_width.values(), strict=True)]
