"""The figure of `tekfac`: errors over steps, losses over steps and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_so2.papers.races import Race
from hf_so2.papers.tekfac.approximations import METHODS


def draw(errors: Sequence[Sequence[Mapping[str, Any]]], races: Mapping[str, Race], path: Path) -> None:
    """Errors on the left; losses of each race, over steps above and over seconds below."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    grid = figure.subplots(2, 1 + len(races))
    _errors(grid[0][0], errors)
    _ratios(grid[1][0], errors)
    for column, (network, race) in enumerate(races.items(), 1):
        _losses(grid[0][column], race, "steps", f"{network}: after the same steps")
        _losses(grid[1][column], race, "seconds", f"{network}: after the same time")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        for line in axes.legend(fontsize=8).get_lines():
            line.set_alpha(1)
    figure.savefig(path, dpi=90)


def _errors(axes: Axes, errors: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    for index, name in enumerate([*METHODS, "stale K-FAC", "stale EKFAC"]):
        points = [(r["step"], r["error"][name]) for records in errors for r in records if name in r["error"]]
        steps = sorted({step for step, _ in points})
        means = [sum(e for s, e in points if s == step) / sum(s == step for s, _ in points) for step in steps]
        axes.plot(steps, means, "o:" if "stale" in name else "o-", color=f"C{index}", label=name)
        axes.plot(*zip(*points, strict=True), ".", color=f"C{index}", alpha=0.3)
    axes.set_xscale("symlog", linthresh=10)
    axes.set(xlabel="step", ylabel="‖F̃ - F‖ / ‖F‖", title="Distance from the block-diagonal Fisher", ylim=(0, None))


def _ratios(axes: Axes, errors: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    for index, name in enumerate(METHODS):
        steps = [record["step"] for record in errors[0]]
        ratios = [
            [records[look]["error"][name] / records[look]["error"]["K-FAC"] for records in errors]
            for look in range(len(steps))
        ]
        means = [sum(values) / len(values) for values in ratios]
        axes.plot(steps, means, "o-", color=f"C{index}", label=name)
        axes.fill_between(steps, [min(v) for v in ratios], [max(v) for v in ratios], color=f"C{index}", alpha=0.15)
    axes.set_xscale("symlog", linthresh=10)
    axes.set(xlabel="step", ylabel="error over K-FAC's", title="The same, over K-FAC's (mean and range over seeds)")


def _losses(axes: Axes, race: Race, over: str, title: str) -> None:
    for index, (name, runs) in enumerate(race.runs.items()):
        if over == "steps" and "the steps" in name:
            continue
        shown = [run for run in runs if all(math.isfinite(loss) for loss in run.losses)]
        for number, run in enumerate(shown):
            x = run.steps if over == "steps" else run.seconds
            axes.plot(x, run.losses, color=f"C{index}", alpha=0.5, linewidth=1, label=None if number else name)
    axes.set(xlabel="step" if over == "steps" else "seconds of training", ylabel="training loss (nats)", title=title)
    axes.set_yscale("log")
