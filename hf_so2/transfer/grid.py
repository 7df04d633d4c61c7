"""Grids of training runs: every combination of some flags, through the real command line, resumable and side by
side.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from hf_so2.errors import ConfigurationError

Flags = Mapping[str, str]

TRAIN = ("-m", "hf_so2.commands.train")  # after the name of this very Python


def combinations(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination of the axes' values, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`"learning_rate=0.03,0.06"` as a name and its values.

    Raises:
        ConfigurationError: the text has no name, no value or an empty one.
    """
    name, _, values = text.partition("=")
    parts = [value.strip() for value in values.split(",")]
    if not name or not all(parts):
        raise ConfigurationError("grid", text, "must be name=value,value,...")
    return name, parts


class GridStore:
    """Finished runs, one JSON line each; what is in the file is not run again.

    Args:
        path: the file; made when the first run ends.

    Raises:
        ConfigurationError: it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self.runs: list[dict[str, Any]] = []
        if path.is_file():
            lines = enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
            self.runs = [self._read(number, line) for number, line in lines if line.strip()]

    def _read(self, number: int, line: str) -> dict[str, Any]:
        try:
            run = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            run = None
        kinds = {"settings": str, "flags": dict, "metrics": dict}
        if not isinstance(run, dict) or not all(isinstance(run.get(key), kind) for key, kind in kinds.items()):
            allowed = f"must hold one finished run per line, which line {number} is not; remove it or name another file"
            raise ConfigurationError("output", str(self.path), allowed)
        return run

    def find(self, settings: str, flags: Flags) -> dict[str, Any] | None:
        """The finished run of these flags, or None."""
        return next((run for run in self.runs if run["settings"] == settings and run["flags"] == dict(flags)), None)

    def add(self, run: dict[str, Any]) -> dict[str, Any]:
        """Keep a run, on disk first: a killed grid loses only what was in flight."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            self.runs.append(run)
        return run


def run_once(program: Sequence[str], settings: str, flags: Flags) -> dict[str, Any]:
    """Train once on one core.

    Args:
        program: what Python is told to run: a file, or `-m` and a module.
        settings: what stands before the flags.
        flags: by name.

    Returns:
        `settings`, `flags`, and `metrics`: what the run left in `all_results.json`, with `eval_loss` None where
        training diverged.

    Raises:
        ConfigurationError: the command refused its flags, or failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *program, settings, f"--output_dir={folder}/run", "--save_strategy=no"]
        command += ["--eval_strategy=no", "--report_to=none", "--disable_tqdm=True"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        results = Path(folder, "run", "all_results.json")
        if done.returncode == 0 and results.is_file():
            metrics = json.loads(results.read_text(encoding="utf-8"))
        elif "TrainingDivergedError" in done.stderr or done.returncode == 3:
            metrics = {"eval_loss": None}
        else:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigurationError("grid", dict(flags), f"the run failed: {last}")
    return {"settings": settings, "flags": dict(flags), "metrics": metrics}


def run_grid(
    program: Sequence[str], settings: str, grid: Iterable[Flags], store: GridStore, jobs: int
) -> Iterator[dict[str, Any]]:
    """The runs of a grid in order; those that the store lacks are trained, `jobs` at a time."""

    def run(flags: Flags) -> dict[str, Any]:
        return store.find(settings, flags) or store.add(run_once(program, settings, flags))

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run, grid)


def validation_loss(run: Mapping[str, Any]) -> float:
    """The final validation loss of a run, infinite where it diverged."""
    loss = run["metrics"]["eval_loss"]
    return math.inf if loss is None else float(loss)


def mean_losses(runs: Iterable[Mapping[str, Any]], rows: str, columns: str) -> dict[tuple[str, str], float]:
    """Validation loss by the values of two flags, averaged over whatever else was varied (seeds, say).

    A diverged run makes its mean infinite. Keys come in the order of the runs.
    """
    losses: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        key = run["flags"][rows], run["flags"].get(columns, "")
        losses.setdefault(key, []).append(validation_loss(run))
    return {key: sum(values) / len(values) for key, values in losses.items()}


def optima(losses: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """For every value of the second flag, the first flag's value of least loss."""
    lines: dict[str, dict[str, float]] = {}
    for (x, line), loss in losses.items():
        lines.setdefault(line, {})[x] = loss
    return {line: min(points, key=points.__getitem__) for line, points in lines.items()}


def markdown_table(losses: Mapping[tuple[str, str], float], rows: str, columns: str) -> str:
    """`mean_losses` with the first flag down and the second across; the best of each column is in bold."""
    row_values = list(dict.fromkeys(row for row, _ in losses))
    column_values = list(dict.fromkeys(column for _, column in losses))
    best = optima(losses)

    def cell(row: str, column: str) -> str:
        if (row, column) not in losses:
            return ""
        loss = losses[row, column]
        if math.isinf(loss):
            return "diverged"
        return f"**{loss:.3f}**" if best[column] == row else f"{loss:.3f}"

    lines = [f"| {rows} \\ {columns} | " + " | ".join(column_values) + " |", "|---" * (len(column_values) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(cell(row, column) for column in column_values) + " |" for row in row_values]
    return "\n".join(lines)
