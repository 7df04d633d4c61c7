"""Where a curve of losses has its least, and how sure that is: a quadratic in the logarithm of the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

REACH = 2.0 * (1 + 1e-6)  # values are written with six digits
SAMPLES = 1000
CONFIDENCE = 0.9

Edge = Literal["", "low", "high"]


@dataclass(frozen=True)
class Optimum:
    """The least of a loss over one hyperparameter.

    Args:
        tested: the tried value of least loss.
        value: where the fitted parabola has its least, or `tested` where no parabola fits.
        low: lower end of the 90 % interval of `value`.
        high: upper end.
        loss: the parabola's least, or the loss at `tested`.
        edge: on which end of the tried values `tested` lies, if on one.
        points: how many values ended with a finite loss.
        coefficients: of the parabola in log2 of the value, highest power first; empty where none fits.
        fitted: lowest and highest of the values that the parabola was fitted to; empty where none fits.
    """

    tested: float
    value: float
    low: float
    high: float
    loss: float
    edge: Edge
    points: int
    coefficients: tuple[float, ...] = ()
    fitted: tuple[float, ...] = ()

    def loss_at(self, value: float) -> float:
        """The parabola at `value`; NaN where none fits."""
        return float(np.polyval(self.coefficients, math.log2(value))) if self.coefficients else math.nan


def find_optimum(curve: Mapping[float, float], noise: float | None = None) -> Optimum | None:
    """Fits the best value, its neighbours and what else is within a factor of two.

    Further out losses rise unequally on the two sides: learning rates end in a cliff, which would push the least of a
    wider parabola away. The interval is a parametric bootstrap: losses are drawn anew around the parabola with the
    standard deviation of `noise` or of the fit's own residuals, whichever is larger; where there is neither, it reaches
    from neighbour to neighbour.

    Args:
        curve: loss by positive value; infinite where the run diverged or was stopped.
        noise: standard deviation of a loss.

    Returns:
        None when no loss is finite.
    """
    finite = {value: loss for value, loss in curve.items() if math.isfinite(loss)}
    if not finite:
        return None
    tested = min(finite, key=finite.__getitem__)
    edge: Edge = "low" if tested == min(curve) else "high" if tested == max(curve) else ""
    if tested <= 0:  # no logarithm: a weight decay of 0
        return Optimum(tested, tested, tested, tested, finite[tested], edge, len(finite))
    ordered = sorted(curve)
    index = ordered.index(tested)
    # With one least only, it is between the neighbours of the best value tried.
    within = ordered[max(0, index - 1)], ordered[min(len(ordered) - 1, index + 1)]
    plain = Optimum(tested, tested, *within, finite[tested], edge, len(finite))
    low, high = min(within[0], tested / REACH), max(within[1], tested * REACH)
    near = {value: loss for value, loss in finite.items() if value > 0 and low <= value <= high}
    return (_fit(plain, near, within, noise) if len(near) >= 3 else None) or plain


def _fit(
    plain: Optimum, points: Mapping[float, float], within: tuple[float, float], noise: float | None
) -> Optimum | None:
    """The parabola through the points, unless its least is no least or not where it must be."""
    x = np.log2(list(points))
    y = np.array(list(points.values()))
    center = float(np.mean(x))
    fit = np.polyfit(x - center, y, 2)
    place = float(vertex(fit[:, None])[0]) + center
    lowest = max(within[0], min(points))  # a weight decay of 0 has no logarithm
    if not (fit[0] > 0 and math.log2(lowest) <= place <= math.log2(within[1])):
        return None
    residuals = y - np.polyval(fit, x - center)
    freedom = len(x) - 3
    spread = max(noise or 0.0, math.sqrt(float(residuals @ residuals) / freedom) if freedom else 0.0)
    low, high = plain.low, plain.high
    if freedom or noise is not None:
        draws = np.random.default_rng(0).normal(np.polyval(fit, x - center)[:, None], spread, (len(x), SAMPLES))
        # A drawn parabola that opens downwards says only that the optimum may be anywhere in reach.
        vertices = np.clip(vertex(np.polyfit(x - center, draws, 2)) + center, min(x) - 1, max(x) + 1)
        low, high = (2.0 ** float(end) for end in np.quantile(vertices, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    a, b, c = (float(value) for value in fit)
    return replace(
        plain,
        value=2.0**place,
        low=low,
        high=high,
        loss=float(np.polyval(fit, place - center)),
        fitted=(min(points), max(points)),
        coefficients=(a, b - 2 * a * center, c - b * center + a * center**2),
    )


def vertex(fits: np.ndarray) -> np.ndarray:
    """Where parabolas, (3, n), have their least; far away on the falling side for those that open downwards."""
    a, b = fits[0], fits[1]
    return np.where(a > 0, -b / (2 * np.where(a > 0, a, 1.0)), -np.sign(b) * 1e3)
