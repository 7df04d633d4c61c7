"""How the best learning rate goes with the model's size: `rate ∝ width^a · depth^b`, with intervals, and what to do.

Least squares in logarithms over all proxies. The intervals are of a parametric bootstrap: every run's loss is drawn
anew around the parabola of its proxy and goes the way of the measured ones (seeds' common effects taken out, parabola,
exponent). The noise is estimated from few runs, so each draw has one of the standard deviations that the estimate
leaves possible (chi-square), which gives in a linear problem Student's interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_so2.transfer.reporting.optimum import find_optimum, vertex
from hf_so2.transfer.trials import Trial, profile, seed_squares, without_seed_effects

Axis = Literal["width", "depth"]
Size = tuple[int, int | None]
"""Width and depth of a proxy; no depth where it was not asked for."""

CONFIDENCE = 0.95
DRAWS = 4000
STILL = 0.25
"""Exponents up to this leave the rate within a factor √2, half a step of the usual grid, of its best in a model four
times as large."""
LARGE = {"width": "wide", "depth": "deep"}
LARGER = {"width": "wider", "depth": "deeper"}

Answer = Literal["still", "moves", "undecided", "unknown"]


@dataclass(frozen=True)
class Exponent:
    """Of the best learning rate over the width or the depth.

    Args:
        axis: of which.
        first: the least size with a fitted optimum.
        last: the largest one.
        value: `log(rate) / log(size)`, the other axis held.
        low: lower end of the 95 % interval; None where the noise is not known.
        high: upper end.
    """

    axis: Axis
    first: int
    last: int
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def answer(self) -> Answer:
        """Whether the whole interval is within ±`STILL`, or beyond it; neither, or there is no interval."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low >= -STILL and self.high <= STILL:
            return "still"
        return "moves" if self.low > STILL or self.high < -STILL else "undecided"

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:+.2f}{interval}"

    def sentence(self, rate: float | None, beyond: tuple[int, float] | None = None) -> str:
        """The answer and what to do, in words.

        Args:
            rate: the learning rate of the recipe, None if there is none.
            beyond: a larger size and the best rate there if the drift goes on.
        """
        over, number = f"over {self.axis} {self.first} to {self.last}", f"exponent {self}"
        reuse = "" if rate is None else f"; reuse {rate:.4g} in the {LARGE[self.axis]} model"
        if self.answer == "still":
            return f"The best rate stands still {over}: {number}{reuse}."
        if self.answer == "moves":
            instead = "" if beyond is None else f", or pass --learning_rate={beyond[1]:.2g} at {self.axis} {beyond[0]}"
            return f"The best rate moves {over}: {number}; tune at a {self.axis} nearer to the target{instead}."
        if self.answer == "undecided":
            return (
                f"Not decided {over}: {number} holds both a rate that stands still (within ±{STILL}) and one that"
                " moves; more seeds (--seeds), a finer grid, or proxies further apart."
            )
        return f"Not decided {over}: {number}, and how sure that is cannot be said without repetitions (--seeds)."


def exponents(trials: Iterable[Trial], name: str, *, per_octave: int | None = None) -> tuple[Exponent, ...]:
    """The exponents of one flag's best value over each axis along which the proxies differ.

    Args:
        trials: of one optimizer, at all sizes.
        name: the flag; its values are positive.
        per_octave: as in `hf_so2.transfer.trials.profile`.

    Returns:
        Nothing for an axis with one size, or where too few curves have a least to tell the axes apart.
    """
    groups: dict[Size, list[Trial]] = {}
    for trial in trials:
        if name in trial.params:
            groups.setdefault((trial.width, trial.depth), []).append(trial)
    curves = {size: curve for size, group in groups.items() if (curve := _curve(group, name, per_octave)) is not None}
    axes: list[tuple[Axis, list[int]]] = []
    for axis, sizes in (("width", [w for w, _ in curves]), ("depth", [d for _, d in curves if d is not None])):
        if len(set(sizes)) > 1 and len(sizes) == len(curves):
            axes.append((axis, sizes))  # type: ignore[arg-type]  # mypy widens the literal
    design = np.array([np.ones(len(curves)), *(np.log2(sizes) for _, sizes in axes)]).T
    if not axes or np.linalg.matrix_rank(design) < design.shape[1]:
        return ()
    solve = np.linalg.pinv(design)[1:]  # (axes, sizes)
    values = solve @ [curve.vertex for curve in curves.values()]
    noise, freedom = _noise(groups.values(), curves.values())
    if not freedom:
        return tuple(Exponent(axis, min(s), max(s), float(v)) for (axis, s), v in zip(axes, values, strict=True))
    rng = np.random.default_rng(0)
    spread = noise * np.sqrt(freedom / rng.chisquare(freedom, DRAWS))
    drawn = solve @ np.stack([curve.draw(spread, rng) for curve in curves.values()])  # (axes, DRAWS)
    ends = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    return tuple(
        Exponent(axis, min(sizes), max(sizes), float(value), float(low), float(high))
        for (axis, sizes), value, low, high in zip(axes, values, *ends, strict=True)
    )


@dataclass(frozen=True)
class _Curve:
    """The points of one proxy's curve.

    Args:
        x: log2 of all values, (points,).
        near: which of them the parabola goes through, (points,).
        fit: its coefficients in `x - center`, highest power first.
        center: mean of the near `x`.
        seeds: which seed was run at which point, the first seed in column 0, (points, seeds).
        first: losses of the first seed, (points,).
    """

    x: np.ndarray
    near: np.ndarray
    fit: np.ndarray
    center: float
    seeds: np.ndarray
    first: np.ndarray

    @property
    def vertex(self) -> float:
        """log2 of the best value."""
        return float(vertex(self.fit[:, None])[0]) + self.center

    def draw(self, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """log2 of best values, (DRAWS,), from losses with noise of the standard deviations `spread`, (DRAWS,)."""
        noise = rng.standard_normal((len(spread), *self.seeds.shape)) * spread[:, None, None] * self.seeds
        # What `without_seed_effects` does: each seed to the level of the first over the points that have both.
        shift = ((noise - noise[:, :, :1]) * self.seeds).sum(1) / np.maximum(self.seeds.sum(0), 1)  # (DRAWS, seeds)
        means = ((noise - shift[:, None]) * self.seeds).sum(2) / self.seeds.sum(1)  # (DRAWS, points)
        x = self.x[self.near] - self.center
        losses = np.polyval(self.fit, x)[:, None] + means[:, self.near].T
        # A drawn parabola that opens downwards says only that the optimum may be anywhere in reach.
        return np.clip(vertex(np.polyfit(x, losses, 2)), x.min() - 1, x.max() + 1) + self.center


def _curve(group: Sequence[Trial], name: str, per_octave: int | None) -> _Curve | None:
    """The curve of one proxy; None where no parabola has its least in it."""
    leveled = without_seed_effects(group)
    losses = profile(leveled, name, per_octave=per_octave)
    optimum = find_optimum(losses)
    if optimum is None or not optimum.coefficients:
        return None
    finite = {value: loss for value, loss in losses.items() if math.isfinite(loss) and value > 0}
    numbers = sorted({trial.seed for trial in group}, key=lambda seed: seed != group[0].seed)
    seeds, first = np.zeros((len(finite), len(numbers))), np.zeros(len(finite))
    for row, (value, loss) in enumerate(finite.items()):
        runs = _runs_behind(leveled, name, value, loss)
        for seed in runs:
            seeds[row, numbers.index(seed)] = 1
        first[row] = runs[group[0].seed]
    x = np.log2(list(finite))
    low, high = optimum.fitted
    near = np.array([low <= value <= high for value in finite])
    center = float(x[near].mean())
    fit = np.polyfit(x[near] - center, np.array(list(finite.values()))[near], 2)
    return _Curve(x, near, fit, center, seeds, first)


def _runs_behind(trials: Sequence[Trial], name: str, value: float, mean: float) -> dict[int, float]:
    """Losses by seed of the setting that a point of a profile stands for."""
    settings: dict[tuple[tuple[str, float], ...], dict[int, float]] = {}
    for trial in trials:
        if trial.params[name] == value:
            settings.setdefault(tuple(sorted(trial.params.items())), {})[trial.seed] = trial.loss
    return min(settings.values(), key=lambda losses: abs(sum(losses.values()) / len(losses) - mean))


def _noise(groups: Iterable[Sequence[Trial]], curves: Iterable[_Curve]) -> tuple[float, int]:
    """Standard deviation of a run's loss and its degrees of freedom, pooled over proxies.

    From what repetitions leave over beyond a seed's common effect, and from what the parabolas leave over of the first
    seed's losses.
    """
    squares, freedom = seed_squares(trial for group in groups for trial in group)
    for curve in curves:
        x, y = curve.x[curve.near] - curve.center, curve.first[curve.near]
        residual = y - np.polyval(np.polyfit(x, y, 2), x)
        squares, freedom = squares + float(residual @ residual), freedom + len(x) - 3
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)
