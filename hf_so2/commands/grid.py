"""Trains every combination of some flags and prints a table of validation losses.

    hf-so2 grid quickstart --optim kfac_mup --output out/quickstart.jsonl \\
        --grid learning_rate=0.03,0.06,0.12 --grid fallback_learning_rate=0.02,0.04,0.08 --jobs 2

Any flag of `hf-so2 train` can be an axis (width, seed, damping, ...). Finished runs are kept in --output, one JSON
line each, and are not run again. Each run uses one core. Rows of the table are the first axis, columns the second;
other axes are averaged over. --figure draws the same: the first axis across, a curve for each value of the second.

    hf-so2 grid quickstart --optim soap_mup --output out/care.jsonl \\
        --descend learning_rate=0.06*2 --descend fallback_learning_rate=0.08*2

walks from that start, one hyperparameter at a time and by these factors, until no neighbour is better by more than
--tolerance; an axis of --grid then holds one value, the same for every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.transfer.descent import Position, descend, parse_ladder, values_at
from hf_so2.transfer.grid import (
    TRAIN,
    GridStore,
    combinations,
    markdown_table,
    mean_losses,
    optima,
    parse_axis,
    run_grid,
    validation_loss,
)
from hf_so2.transfer.reporting.plots import plot_losses


def main() -> None:
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML or JSON file, or a name of `hf-so2 config`")
    parser.add_argument("--optim", nargs="+", required=True, help="one table for each")
    parser.add_argument("--grid", action="append", default=[], help="name=value,value,... (any number of times)")
    parser.add_argument("--descend", action="append", default=[], help="name=start*factor (any number of times)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats that a move of --descend has to gain")
    parser.add_argument("--output", required=True, type=Path, help="JSON lines file of finished runs")
    parser.add_argument("--figure", type=Path, help="PNG to draw the losses into")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if cli.settings_path(args.settings) is None:
        raise ConfigurationError("settings", args.settings, "must be an existing YAML or JSON file")
    if args.jobs < 1:
        raise ConfigurationError("jobs", args.jobs, "must be at least 1")
    for name, path in (("output", args.output), ("figure", args.figure)):
        if path is not None:
            require_folder(name, path.parent)
            if path.is_dir():
                raise ConfigurationError(name, str(path), "must be a file, and is a folder")
    axes = dict(parse_axis(text) for text in args.grid)
    if args.descend:
        walk(args, axes)
    elif axes:
        tabulate(args, axes)
    else:
        raise ConfigurationError("grid", None, "needs --grid or --descend")


def tabulate(args: argparse.Namespace, axes: Mapping[str, Sequence[str]]) -> None:
    """Every combination of the axes, a table and a figure."""
    rows, columns = [*axes, ""][:2]
    store = GridStore(args.output)
    panels = {}
    for optim in args.optim:
        runs = []
        grid = [{"optim": optim, **flags} for flags in combinations(axes)]
        for run in run_grid(TRAIN, args.settings, grid, store, args.jobs):
            print(f"{optim} {shown(run, axes)}: eval_loss {run['metrics']['eval_loss']}", flush=True)
            runs.append(run)
        panels[optim] = mean_losses(runs, rows, columns)
        print(f"\n{optim}, validation loss\n\n{markdown_table(panels[optim], rows, columns)}\n")
        for value, best in optima(panels[optim]).items():
            print(f"best {rows} at {columns} {value}: {best}" if columns else f"best {rows}: {best}", flush=True)
    if args.figure is not None:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        plot_losses(panels, args.figure, rows, columns)


def walk(args: argparse.Namespace, axes: Mapping[str, Sequence[str]]) -> None:
    """Coordinate descent for each optimizer; prints where it ends."""
    for name, values in axes.items():
        if len(values) > 1:
            raise ConfigurationError("grid", f"{name}={','.join(values)}", "must be one value beside --descend")
    if args.figure is not None:
        raise ConfigurationError("figure", str(args.figure), "is drawn of a --grid only")
    fixed = {name: values[0] for name, values in axes.items()}
    ladders = dict(parse_ladder(text) for text in args.descend)
    store = GridStore(args.output)
    for optim in args.optim:

        def losses_of(positions: Sequence[Position], optim: str = optim) -> list[float]:
            grid = [{"optim": optim, **fixed, **values_at(ladders, position)} for position in positions]
            losses = []
            for run in run_grid(TRAIN, args.settings, grid, store, args.jobs):
                losses.append(validation_loss(run))
                print(f"{optim} {shown(run, ladders)}: {losses[-1]:.4f}", flush=True)
            return losses

        best = descend(tuple(ladders), losses_of, args.tolerance)
        print(f"best {optim}: {values_at(ladders, best)}", flush=True)


def shown(run: Mapping[str, Any], names: Iterable[str]) -> str:
    """Some flags of a run, to print."""
    return " ".join(f"{name}={run['flags'][name]}" for name in names)
