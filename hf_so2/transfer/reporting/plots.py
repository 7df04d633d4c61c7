"""Figures that the commands leave beside their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window, no global state, whatever the user's backend is

from hf_so2.transfer.reporting.optimum import Optimum
from hf_so2.transfer.reporting.verdict import RATE, WIDER, Verdict, predicted_loss, predicted_rate

Color: TypeAlias = tuple[float, float, float, float]
LOSS = "validation loss (nats per token)"
MOST_TICKS = 8


def plot_loss_curve(log_history: Iterable[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draws training and evaluation loss against the optimizer step into a PNG.

    Args:
        log_history: Trainer's ``state.log_history``: entries with ``step`` and ``loss`` or ``eval_loss``
            (nats per token).
        path: the file to write.
        title: what was trained.
    """
    entries = list(log_history)
    training = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), ".-", color="tab:blue", linewidth=1.5, label="training loss")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="tab:orange", label="evaluation loss")
        step, loss = evaluation[-1]
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color="tab:orange",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if training or evaluation:
        axes.legend()
    figure.savefig(path, dpi=150)


def plot_losses(
    panels: Mapping[str, Mapping[tuple[str, str], float]],
    path: str | Path,
    x: str,
    line: str,
    optima: Mapping[str, Mapping[str, Optimum]] | None = None,
) -> None:
    """Draws validation loss against one flag, a curve for each value of another, a panel for each optimizer.

    Args:
        panels: by title: losses (nats per token) by the values of the two flags, as `hf_so2.transfer.grid.mean_losses`
            gives them; runs of infinite loss are crosses at the top.
        path: the PNG to write.
        x: name of the first flag; its values are numbers and the axis is logarithmic.
        line: name of the second flag.
        optima: by title and value of the second flag: parabolas and intervals to draw besides.
    """
    figure = Figure(figsize=(5 * len(panels) + 1, 4.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    # A run that nearly diverged must not flatten the region that decides.
    shown = sorted(loss for losses in panels.values() for loss in losses.values() if math.isfinite(loss))
    if shown:
        spread = max(shown[int(0.75 * (len(shown) - 1))] - shown[0], 0.01)
        top = min(shown[-1] + 0.1 * spread, shown[0] + 2.5 * spread)
        grid[0].set_ylim(shown[0] - 0.2 * spread, top)
    for axes, (title, losses) in zip(grid, panels.items(), strict=True):
        values = list(dict.fromkeys(second for _, second in losses))
        for index, value in enumerate(values):
            color = colormaps["viridis"](0.85 * index / max(1, len(values) - 1))
            points = sorted((float(first), loss) for (first, second), loss in losses.items() if second == value)
            optimum = (optima or {}).get(title, {}).get(value)
            _draw_curve(axes, points, color, f"{line} {value}", optimum)
        tested = sorted({first for first, _ in losses}, key=float)
        if tested and float(tested[0]) > 0:
            axes.set_xscale("log")
        else:  # a weight decay of 0
            axes.set_xscale("symlog", linthresh=min((float(first) for first in tested if float(first) > 0), default=1))
        axes.set(xlabel=x, title=title)
        if len(tested) <= MOST_TICKS:
            axes.set_xticks([float(first) for first in tested], tested)
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    grid[0].set_ylabel(LOSS)
    figure.savefig(path, dpi=150)


def _draw_curve(
    axes: Axes, points: Iterable[tuple[float, float]], color: Color, label: str, optimum: Optimum | None
) -> None:
    points = list(points)
    finite = [(first, loss) for first, loss in points if math.isfinite(loss)]
    stopped = [first for first, loss in points if not math.isfinite(loss)]
    if stopped:
        top = axes.get_ylim()[1]
        axes.plot(stopped, [top] * len(stopped), "x", color=color, clip_on=False, zorder=3)
    if not finite:
        return
    fitted = optimum is not None and bool(optimum.coefficients)
    axes.plot(*zip(*finite, strict=True), "o:" if fitted else "o-", color=color, linewidth=1, label=label)
    axes.plot(*min(finite, key=lambda point: point[1]), "*", color=color, markersize=15)
    if optimum is not None and fitted:
        lowest, highest = optimum.fitted
        x = np.geomspace(lowest, highest, 60)
        axes.plot(x, [optimum.loss_at(float(value)) for value in x], "-", color=color)
        axes.axvspan(optimum.low, optimum.high, color=color, alpha=0.08)
        axes.axvline(optimum.value, color=color, linestyle=":", linewidth=1)


def plot_sizes(verdicts: Mapping[str, Verdict], path: str | Path) -> None:
    """Draws loss and optimal learning rate against the width, or the depth, a curve for each optimizer.

    Args:
        verdicts: by the optimizer's name, of one axis.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    widths: set[int] = set()
    for index, (optim, verdict) in enumerate(verdicts.items()):
        color = f"C{index}"
        widths |= set(verdict.losses)
        left.plot(*_columns(verdict.losses), "o-", color=color, label=optim)
        last = max(verdict.losses, default=0)
        target = WIDER * last
        bounds = predicted_loss(verdict.losses, target)
        if bounds is not None:
            lowest, highest = bounds
            left.fill_between([last, target], [highest, lowest], [highest] * 2, color=color, alpha=0.15)
            widths.add(target)
        optima = verdict.optima.get(RATE, {})
        if optima:
            values = [optimum.value for optimum in optima.values()]
            below = [max(0.0, optimum.value - optimum.low) for optimum in optima.values()]
            above = [max(0.0, optimum.high - optimum.value) for optimum in optima.values()]
            right.errorbar(list(optima), values, [below, above], fmt="o-", color=color, capsize=4, label=optim)
            widths |= set(optima)
            last = max(optima)
            target = WIDER * last
            rates = predicted_rate(optima, target)
            if rates is not None:
                right.fill_between([last, target], [rates[0]] * 2, rates, color=color, alpha=0.15)
                widths.add(target)
    left.set(ylabel=LOSS, title="Loss at the setting found, and its range beyond")
    right.set(ylabel="learning rate", title="Optimal learning rate, 90 % interval, and its range beyond")
    right.set_yscale("log", base=2)
    # Room for steps of a usual grid, beside which a small drift looks small.
    bottom, top = right.get_ylim()
    right.set_ylim(bottom / 2, top * 2)
    right.yaxis.set_major_formatter(lambda rate, _: f"{rate:.2g}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(widths), [str(width) for width in sorted(widths)])
        axes.minorticks_off()
        axes.set_xlabel("layers" if any(verdict.axis == "depth" for verdict in verdicts.values()) else "hidden size")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=150)


def _columns(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    widths = sorted(points)
    return widths, [points[width] for width in widths]
