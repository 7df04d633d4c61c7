"""The figure of a coordinate check: a column per step, changes against width on logarithmic axes."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from hf_so2.mup.coord_check import CoordinateCheck, Quantity
from hf_so2.mup.rules import Role

_COLOURS: dict[Role, str] = {"input": "tab:green", "hidden": "tab:blue", "output": "tab:red"}
_ROWS: dict[Quantity, str] = {
    "activation": "change of the layers' outputs (RMS)",
    "update": "part of it by the weights, ΔW·x (RMS)",
}


def plot_coordinate_check(check: CoordinateCheck, path: str | Path, compared: CoordinateCheck | None = None) -> None:
    """Draws a check into a PNG: level lines pass.

    Args:
        check: solid lines, one per role, labelled with their exponents.
        path: the file to write.
        compared: dashed lines, for instance the same optimizer in the standard parametrization.
    """
    columns = len(check.steps)
    figure = Figure(figsize=(3.6 * columns + 1.2, 7.2), layout="constrained")
    grid = figure.subplots(len(_ROWS), columns, sharex=True, sharey="row", squeeze=False)
    for axes_row, (quantity, label) in zip(grid, _ROWS.items(), strict=True):
        for axes, step in zip(axes_row, check.steps, strict=True):
            for run, style in ((check, "o-"), (compared, "s--")):
                for role, colour in _COLOURS.items() if run is not None else ():
                    assert run is not None
                    curve = run.curve(role, quantity, step)
                    points = {width: value for width, value in curve.items() if math.isfinite(value)}
                    if points:
                        name = f"{run.optim} {role} {run.slope(role, quantity, step):+.2f}"
                        faint = 1.0 if run is check else 0.55
                        axes.plot(*zip(*points.items(), strict=True), style, color=colour, alpha=faint, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(check.widths, [str(width) for width in check.widths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, title="exponent of the width", title_fontsize=7)
            if quantity == "activation":
                axes.set_title(f"after step {step}")
            else:
                axes.set_xlabel("hidden size")
        axes_row[0].set_ylabel(label)
    verdict = "level" if check.passed else "not level"
    figure.suptitle(f"Coordinate check, {check.optim}: {verdict} within ±{check.tolerance:g} over {check.seeds} seeds")
    figure.savefig(path, dpi=130)
