"""The figures of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from hf_so2.benchmark.phases import PHASES
from hf_so2.benchmark.report import ratios
from hf_so2.benchmark.rounds import Measurement


def plot_benchmark(measurements: Sequence[Measurement], baseline: str, path: str | Path, title: str) -> None:
    """Draws each optimizer's step, split into phases, and its state into a PNG.

    Args:
        measurements: of all optimizers.
        baseline: whose whole step is 1 on the axis.
        path: the file to write.
        title: the model and the tokens of a step.
    """
    spreads = ratios(measurements, baseline)
    ordered = sorted(measurements, key=lambda m: spreads[m.name].median, reverse=True)
    names = [_label(m.name) for m in ordered]
    row_height = max(0.4, 0.15 * max(name.count("\n") + 1 for name in names))
    figure = Figure(figsize=(11, 1.2 + row_height * len(ordered)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left = [0.0] * len(ordered)
    for index, phase in enumerate(PHASES):
        # Shares of the measured ratio, so that bars end where the table says.
        widths = [spreads[m.name].median * m.phase(phase) / sum(m.phase(other) for other in PHASES) for m in ordered]
        times.barh(names, widths, left=left, color=colormaps["viridis"](index / (len(PHASES) - 1)), label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, m in enumerate(ordered):
        spread = spreads[m.name]
        times.plot([spread.lower, spread.upper], [row, row], color="black", linewidth=1.5)
        times.annotate(f" {spread.median:.2f}", (max(spread.upper, spread.median), row), va="center", fontsize=8)
    times.axvline(1.0, color="tab:red", linewidth=1)
    times.set(xlabel=f"time of a training step ({baseline}: 1), quartiles", title=title)
    times.legend(fontsize=7)
    memory.barh(names, [m.state_bytes_per_parameter for m in ordered], color="tab:blue")
    memory.set(xlabel="state, bytes\nper parameter")
    for axes in (times, memory):
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=150)


def plot_equal_time(losses: Mapping[str, Mapping[str, float]], baseline: str, path: str | Path) -> None:
    """Draws the validation loss of every optimizer after equal seconds into a PNG.

    Args:
        losses: nats per token by optimizer and by share of the baseline's seconds; what is not finite is left out.
        baseline: whose loss at the largest share is drawn across.
        path: the file to write.
    """
    shares = sorted(next(iter(losses.values())), key=float, reverse=True)
    ordered = sorted(losses, key=lambda name: losses[name][shares[0]], reverse=True)
    figure = Figure(figsize=(8, 1.5 + 0.45 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for index, share in enumerate(shares):
        points = [(losses[name][share], _label(name)) for name in ordered if math.isfinite(losses[name][share])]
        if points:
            color = colormaps["viridis"](0.85 * index / max(1, len(shares) - 1))
            axes.plot(*zip(*points, strict=True), "o", color=color, label=f"{share} of {baseline}'s seconds")
    if baseline in losses and math.isfinite(losses[baseline][shares[0]]):
        axes.axvline(losses[baseline][shares[0]], color="tab:red", linewidth=1)
    axes.set(xlabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _label(name: str) -> str:
    """An optimizer's name, with each of its settings on a line of its own, as wide labels leave little for the bars."""
    return name.replace(":", "\n").replace(",", "\n")


def plot_growth(seconds: Mapping[str, Mapping[int, float]], exponents: Mapping[str, float], path: str | Path) -> None:
    """Draws the time of a step against the hidden size into a PNG.

    Args:
        seconds: by optimizer: median seconds of a step by hidden size.
        exponents: of the fits, for the legend.
        path: the file to write.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(seconds.items()):
        color = colormaps["viridis"](0.9 * index / max(1, len(seconds) - 1))
        axes.plot(*zip(*points.items(), strict=True), "o-", color=color, label=f"{name} {exponents[name]:.2f}")
    axes.set(xlabel="hidden size", ylabel="seconds of a step")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    widths = sorted({width for points in seconds.values() for width in points})
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="exponent of the width", title_fontsize=8)
    figure.savefig(path, dpi=150)
