"""The figure of `foof`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_so2.papers.foof.claims import CLOSE
from hf_so2.papers.foof.runs import DAMPINGS
from hf_so2.papers.races import Race


def draw(races: Mapping[str, Race], angles: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Losses along the directions, cosines over the damping, and losses of the package's optimizers over time."""
    figure = Figure(figsize=(20, 4.4), layout="constrained")
    left, middle, *others = figure.subplots(1, 4)
    runs = races["one batch"].runs
    for index, (name, of_method) in enumerate(runs.items()):
        for number, run in enumerate(of_method):
            if all(math.isfinite(loss) for loss in run.losses):
                label = name if number == 0 else None
                left.plot(run.steps, run.losses, color=f"C{index}", alpha=0.6, linewidth=1, label=label)
        curves = [record["by damping"].get(name) for records in angles for record in records]
        if all(curves) and name != "gradient":
            for number, curve in enumerate(curves):
                label = name if number == 0 else None
                middle.plot(DAMPINGS, curve, color=f"C{index}", alpha=0.3, linewidth=1, label=label)
    for axes, network in zip(others, ("MLP", "ViT"), strict=True):
        for name, of_method in races[f"package, {network}"].runs.items():
            color = f"C{list(runs).index(name)}"
            for number, run in enumerate(of_method):
                label = name if number == 0 else None
                axes.plot(run.seconds, run.losses, color=color, alpha=0.6, linewidth=1, label=label)
        title = f"The package's optimizers, {network}"
        axes.set(xlabel="seconds of training", ylabel="training loss (nats)", title=title)
    left.set(xlabel="step", ylabel="training loss (nats)", title="Along directions of one batch, tuned alike")
    middle.set(xlabel="damping of the other", ylabel="cosine", title="Angle to K-FAC's update")
    middle.set_xscale("log")
    middle.axhline(CLOSE, color="black", linestyle=":", linewidth=1)
    for axes in (left, *others):
        axes.set_yscale("log")
    left.set_ylim(top=5.0)  # a run that went astray must not flatten the rest
    for axes in (left, middle, *others):
        axes.grid(alpha=0.3)
        legend = axes.legend(fontsize=8)
        for line in legend.get_lines():
            line.set_alpha(1)
    figure.savefig(path, dpi=100)
