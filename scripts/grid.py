"""Trains every combination of some flags and prints a table of validation losses.

    python scripts/grid.py configs/quickstart.yaml --optim kfac_mup --output docs/results/quickstart.jsonl \\
        --grid learning_rate=0.03,0.06,0.12 --grid fallback_learning_rate=0.02,0.04,0.08 --jobs 2

Any flag of scripts/train.py can be an axis (width, seed, damping, ...). Finished runs are kept in --output, one JSON
line each, and are not run again. Each run uses one core. Rows of the table are the first axis, columns the second;
other axes are averaged over. --figure draws the same: the first axis across, a curve for each value of the second.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.transfer.grid import GridStore, combinations, markdown_table, mean_losses, optima, parse_axis, run_grid
from hf_so2.transfer.plots import plot_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML or JSON file, as for scripts/train.py")
    parser.add_argument("--optim", nargs="+", required=True, help="one table for each")
    parser.add_argument("--grid", action="append", required=True, help="name=value,value,... (one or more times)")
    parser.add_argument("--output", required=True, type=Path, help="JSON lines file of finished runs")
    parser.add_argument("--figure", type=Path, help="PNG to draw the losses into")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if not Path(args.settings).is_file():
        raise ConfigurationError("settings", args.settings, "must be an existing YAML or JSON file")
    axes = dict(parse_axis(text) for text in args.grid)
    rows, columns = [*axes, ""][:2]
    store = GridStore(args.output)
    panels = {}
    for optim in args.optim:
        runs = []
        grid = [{"optim": optim, **flags} for flags in combinations(axes)]
        for run in run_grid(Path(__file__).with_name("train.py"), args.settings, grid, store, args.jobs):
            shown = " ".join(f"{name}={run['flags'][name]}" for name in axes)
            print(f"{optim} {shown}: eval_loss {run['metrics']['eval_loss']}", flush=True)
            runs.append(run)
        panels[optim] = mean_losses(runs, rows, columns)
        print(f"\n{optim}, validation loss\n\n{markdown_table(panels[optim], rows, columns)}\n")
        for value, best in optima(panels[optim]).items():
            print(f"best {rows} at {columns} {value}: {best}" if columns else f"best {rows}: {best}", flush=True)
    if args.figure is not None:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        plot_losses(panels, args.figure, rows, columns)


if __name__ == "__main__":
    sys.exit(cli.main(main))
