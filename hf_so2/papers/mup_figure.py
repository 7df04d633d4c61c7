"""The figure of `mup_transfer`: rates, dampings and feature changes over the width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HIGHEST = 5.0  # nats: runs that diverged must not flatten the rest


def draw(tables: Mapping[str, Any], path: Path) -> None:
    """A row for each method: losses over rates under μP and SP, over dampings, and changes of outputs over widths."""
    figure = Figure(figsize=(19, 12), layout="constrained")
    grid = figure.subplots(3, 4)
    for row, name in enumerate(("K-FAC", "Shampoo")):
        for column, parametrization in enumerate(("SP", "μP")):
            setup = f"{name}, {parametrization}"
            _scores(grid[row][column], tables["scores_by_rate"][setup], f"{setup}: best rate", "learning rate")
        _scores(grid[row][2], tables["scores_by_damping"][f"{name}, μP"], f"{name}, μP: rescaled damping", "damping ε")
        _changes(grid[row][3], tables, name)
    for column, name in enumerate(("K-FAC", "Shampoo")):
        setup = f"{name}, spectral control, μP"
        _scores(grid[2][column], tables["scores_by_rate"][setup], setup, "learning rate")
    other = "K-FAC, constant damping, SP"
    _scores(grid[2][2], tables["scores_by_damping"][other], other, "damping")
    _zero(grid[2][3], tables["zero"])
    figure.savefig(path, dpi=80)


def _scores(axes: Axes, curves: Mapping[int, Mapping[int, Mapping[float, float]]], title: str, x: str) -> None:
    for index, (width, by_seed) in enumerate(curves.items()):
        color = colormaps["viridis"](0.85 * index / max(1, len(curves) - 1))
        values = list(next(iter(by_seed.values())))
        means = [10 ** (sum(curve[value] for curve in by_seed.values()) / len(by_seed)) for value in values]
        finite = [(value, mean) for value, mean in zip(values, means, strict=True) if math.isfinite(mean)]
        if finite:
            axes.plot(*zip(*finite, strict=True), "o-", color=color, markersize=4, label=f"M = {width}")
            axes.plot(*min(finite, key=lambda point: point[1]), "*", color=color, markersize=15)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel="training loss (nats)", title=title)
    axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _changes(axes: Axes, tables: Mapping[str, Any], name: str) -> None:
    for parametrization, style in (("μP", "o-"), ("SP", "x:")):
        changes = list(tables["feature_change"][f"{name}, {parametrization}"]["changes"].values())
        widths = list(changes[0])
        for layer in range(len(changes[0][widths[0]])):
            means = [math.exp(sum(math.log(c[width][layer]) for c in changes) / len(changes)) for width in widths]
            axes.plot(widths, means, style, color=f"C{layer}", label=f"layer {layer + 1}, {parametrization}")
    axes.set(xscale="log", yscale="log", xlabel="width M", ylabel="RMS change of outputs", title=f"{name}: Δh")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _zero(axes: Axes, records: list[Mapping[str, Any]]) -> None:
    widths = sorted(records[0]["zero"])
    for start, style in (("zero", "o-"), ("random", "x:")):
        for color, what in enumerate(("own", "nngp")):
            key = f"cosine_{what}_kernel"
            means = [sum(record[start][width][key] for record in records) / len(records) for width in widths]
            label = f"last layer {start}, kernel of {'the features' if what == 'own' else 'infinite width'}"
            axes.plot(widths, means, style, color=f"C{color}", label=label)
    axes.set(xscale="log", xlabel="width M", ylabel="cosine", title="K-FAC's first step and kernel regression")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
