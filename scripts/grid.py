"""Trains every combination of some flags and prints a table of validation losses.

    python scripts/grid.py configs/quickstart.yaml --optim kfac_mup --output docs/results/quickstart.jsonl \\
        --grid learning_rate=0.03,0.06,0.12 --grid fallback_learning_rate=0.02,0.04,0.08 --jobs 2

Any flag of scripts/train.py can be an axis (width, seed, damping, ...). Finished runs are kept in --output, one JSON
line each, and are not run again. Each run uses one core. Rows of the table are the first axis, columns the second;
other axes are averaged over.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.transfer.grid import GridStore, combinations, markdown_table, parse_axis, run_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML or JSON file, as for scripts/train.py")
    parser.add_argument("--optim", nargs="+", required=True, help="one table for each")
    parser.add_argument("--grid", action="append", required=True, help="name=value,value,... (one or more times)")
    parser.add_argument("--output", required=True, type=Path, help="JSON lines file of finished runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if not Path(args.settings).is_file():
        raise ConfigurationError("settings", args.settings, "must be an existing YAML or JSON file")
    axes = dict(parse_axis(text) for text in args.grid)
    store = GridStore(args.output)
    for optim in args.optim:
        runs = []
        for run in run_grid(
            args.settings, [{"optim": optim, **flags} for flags in combinations(axes)], store, args.jobs
        ):
            shown = " ".join(f"{name}={run['flags'][name]}" for name in axes)
            print(f"{optim} {shown}: eval_loss {run['metrics']['eval_loss']}", flush=True)
            runs.append(run)
        names = [*axes, ""]
        print(f"\n{optim}, validation loss\n\n{markdown_table(runs, names[0], names[1])}\n", flush=True)


if __name__ == "__main__":
    sys.exit(cli.main(main))
