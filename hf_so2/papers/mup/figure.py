"""The figure of `mup_transfer`: rates, dampings and feature changes over the width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_so2.papers.mup.claims import NAMES
from hf_so2.papers.mup.curves import Curves
from hf_so2.papers.mup.setups import MLP

COLUMNS = ("SP", "μP", "spectral control, μP")


def draw(tables: Mapping[str, Any], path: Path) -> None:
    """A row for each network and method: losses over rates; beside the MLP's, over dampings, and changes of outputs."""
    networks = tables["networks"]
    figure = Figure(figsize=(24, 4.2 * len(NAMES) * len(networks)), layout="constrained")
    grid = figure.subplots(len(NAMES) * len(networks), len(COLUMNS) + 3, squeeze=False)
    rows = iter(grid)
    for network, found in networks.items():
        for name in NAMES:
            row = list(next(rows))
            for column in COLUMNS:
                _scores(row.pop(0), found["rates"][f"{name}, {column}"], f"{network}: {name}, {column}", "rate")
            if found["dampings"]:
                for column in ("SP", "μP"):
                    curves = found["dampings"][f"{name}, {column}"]
                    _scores(row.pop(0), curves, f"{network}: {name}, {column}", "damping")
                _changes(row.pop(0), tables, name)
            elif name == NAMES[0]:
                _last_layer(row.pop(0), tables)
                _zero(row.pop(0), tables["zero"])
            for axes in row:
                axes.set_axis_off()
    figure.savefig(path, dpi=65)


def _scores(axes: Axes, curves: Curves, title: str, what: str) -> None:
    for index, (width, by_seed) in enumerate(curves.items()):
        color = colormaps["viridis"](0.85 * index / max(1, len(curves) - 1))
        steps = list(next(iter(by_seed.values())))
        means = [10 ** (sum(c[step] for c in by_seed.values()) / len(by_seed)) for step in steps]
        axes.plot(steps, means, "o-", color=color, markersize=4, label=f"M = {width}")
        best = min(range(len(steps)), key=means.__getitem__)
        axes.plot(steps[best], means[best], "*", color=color, markersize=15)
    axes.set(xlabel=f"log2({what} / tuned {what})", ylabel="loss (nats)", title=title)
    if title.startswith(MLP.name):  # on text, losses stay within a small factor
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _changes(axes: Axes, tables: Mapping[str, Any], name: str) -> None:
    for parametrization, style in (("μP", "o-"), ("SP", "x:")):
        changes = list(tables["feature_change"][f"{name}, {parametrization}"]["changes"].values())
        widths = list(changes[0])
        for layer in range(len(changes[0][widths[0]])):
            means = [math.exp(sum(math.log(c[width][layer]) for c in changes) / len(changes)) for width in widths]
            axes.plot(widths, means, style, color=f"C{layer}", label=f"layer {layer + 1}, {parametrization}")
    _over_widths(axes, widths, "RMS change of outputs", f"{name}: Δh after a few steps")
    axes.set_yscale("log")
    axes.legend(fontsize=7, ncols=2)


def _last_layer(axes: Axes, tables: Mapping[str, Any]) -> None:
    for index, (exponent, table) in enumerate(tables["last_layer"].items()):
        changes = list(table["changes"].values())
        widths = list(changes[0])
        hidden = [
            math.exp(
                sum(math.log(value) for c in changes for value in c[width][:-1])
                / len(changes)
                / len(changes[0][width][:-1])
            )
            for width in widths
        ]
        axes.plot(widths, hidden, "o-", color=f"C{index}", label=f"last layer M^-{exponent:g}")
        expected = [hidden[0] * (width / widths[0]) ** (exponent - 1) for width in widths]
        axes.plot(widths, expected, ":", color=f"C{index}", label=f"M^{exponent - 1:g}")
    _over_widths(axes, widths, "RMS change of hidden outputs", "K-FAC: Δh of the first step")
    axes.set_yscale("log")
    axes.legend(fontsize=8)


def _zero(axes: Axes, records: list[Mapping[str, Any]]) -> None:
    widths = sorted(records[0]["zero"])
    for start, style in (("zero", "o-"), ("random", "x:")):
        for color, what in enumerate(("own", "nngp")):
            key = f"cosine_{what}_kernel"
            means = [sum(record[start][width][key] for record in records) / len(records) for width in widths]
            label = f"last layer {start}, kernel of {'the features' if what == 'own' else 'infinite width'}"
            axes.plot(widths, means, style, color=f"C{color}", label=label)
    _over_widths(axes, widths, "cosine", "K-FAC's first step and kernel regression")
    axes.legend(fontsize=8)


def _over_widths(axes: Axes, widths: list[int], ylabel: str, title: str) -> None:
    axes.set(xscale="log", xlabel="width M", ylabel=ylabel, title=title)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
