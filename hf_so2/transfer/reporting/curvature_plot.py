"""The curvature of a run over its steps, from the Trainer's log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PREFIX = "curvature/"
PANELS = {"damping": "damping ρ", "condition": "condition number", "update_rms": "size of updates (RMS)"}
DASHES = {"": "-", "A": "-", "L": "-", "B": "--", "R": "--"}
MOST_NAMES = 8  # roles are few; `--curvature_log layer` has a line for every layer


def curves(log_history: Iterable[Mapping[str, Any]]) -> dict[str, dict[tuple[str, str], list[tuple[int, float]]]]:
    """Points (step, value) by quantity, and by role (or layer) and side of the factor; the side is "" without one."""
    found: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if not key.startswith(PREFIX):
                continue
            place, _, name = key.removeprefix(PREFIX).rpartition("/")
            quantity, side = (name[:-2], name[-1]) if name[-2:-1] == "_" else (name, "")
            if place and quantity in PANELS:
                found.setdefault(quantity, {}).setdefault((place, side), []).append((entry["step"], value))
    return found


def plot_curvature(log_history: Iterable[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draws damping, condition numbers and sizes of updates against the optimizer step into a PNG.

    Without any of them in the log (a first-order method, `--curvature_log none`) no file is written.

    Args:
        log_history: Trainer's ``state.log_history``.
        path: the file to write.
        title: what was trained.
    """
    found = curves(log_history)
    shown = [quantity for quantity in PANELS if quantity in found]
    if not shown:
        return
    places = list(dict.fromkeys(place for quantity in shown for place, _ in found[quantity]))
    figure = Figure(figsize=(4.6 * len(shown), 4.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for (place, side), points in found[quantity].items():
            color = f"C{places.index(place) % 10}"
            label = f"{place}, {side}" if side else place
            axes.plot(*zip(*points, strict=True), f".{DASHES[side]}", color=color, linewidth=1.2, label=label)
        if all(value > 0 for points in found[quantity].values() for _, value in points):
            axes.set_yscale("log")
        axes.set(xlabel="optimizer step", title=PANELS[quantity])
        axes.grid(alpha=0.3)
        if len(places) <= MOST_NAMES:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
