"""Figures that the scripts leave beside their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: no window, no global state, whatever the user's backend is


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


def plot_losses(panels: Mapping[str, Mapping[tuple[str, str], float]], path: str | Path, x: str, line: str) -> None:
    """Draws validation loss against one flag, a curve for each value of another, a panel for each optimizer.

    Args:
        panels: by title: losses (nats per token) by the values of the two flags, as `hf_so2.transfer.grid.mean_losses`
            gives them; infinite ones are left out.
        path: the PNG to write.
        x: name of the first flag; its values are numbers and the axis is logarithmic.
        line: name of the second flag.
    """
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, losses) in zip(grid, panels.items(), strict=True):
        values = list(dict.fromkeys(second for _, second in losses))
        for index, value in enumerate(values):
            color = colormaps["viridis"](0.85 * index / max(1, len(values) - 1))
            points = sorted((float(first), loss) for (first, second), loss in losses.items() if second == value)
            finite = [(first, loss) for first, loss in points if math.isfinite(loss)]
            axes.plot(*zip(*finite, strict=True), "o-", color=color, label=f"{line} {value}")
            axes.plot(*min(finite, key=lambda point: point[1]), "*", color=color, markersize=15)
        tested = sorted({first for first, _ in losses}, key=float)
        axes.set(xscale="log", xlabel=x, title=title)
        axes.set_xticks([float(first) for first in tested], tested)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    # A run that nearly diverged must not flatten the region that decides.
    shown = sorted(loss for losses in panels.values() for loss in losses.values() if math.isfinite(loss))
    spread = shown[int(0.75 * (len(shown) - 1))] - shown[0]
    grid[0].set_ylim(shown[0] - 0.2 * spread, min(shown[-1] + 0.1 * spread, shown[0] + 2.5 * spread))
    grid[0].set_ylabel("validation loss (nats per token)")
    figure.savefig(path, dpi=150)
