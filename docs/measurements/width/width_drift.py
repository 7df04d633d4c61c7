"""Which part of K-FAC makes its best learning rate move with the width?

    python docs/measurements/width/prepare_tokens.py out/tokens
    python docs/measurements/width/width_drift.py --data out/tokens --output out/width --device cuda --workers 14 --tf32
    python docs/measurements/width/width_drift_table.py out/width/results.jsonl --output out/width

Trains the Llama of `configs/transfer.yaml` over widths, rates, seeds and variants of the size of an update, of the
damping and of the blocks, many runs side by side on one device. What to run next is decided by what has come back: a
curve over the rate is followed until its least is bracketed, the most informative curves first, so that the program
may be stopped at any time. One JSON line per run in `results.jsonl`; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from width_runs import BASE, VARIANTS, Run, patch, train

from hf_so2.errors import TrainingDivergedError

# Which run next.

# At the base width the same as another.
SAME_AT_BASE = {
    "S_mean": "S", "S_root": "S", "S_blocks": "S", "SF_mean": "SF", "SF_blocks": "SF", "P4_mean": "P4"
}  # fmt: skip

# The step of the grid of the best rate at width 64, and by how many steps it moves with each doubling of the width.
CENTRES: dict[str, tuple[float, float]] = {
    "S": (0, 0.75), "S_exact": (0, 0.75), "S_mean": (0, 0.5), "S_root": (0, 0.6), "S_eps1e-2": (0, 0.5),
    "S_eps1e-4": (0, 0.75), "S_spectral": (0, 0.6), "S_blocks": (0, 0.4), "S_fallback_half": (0, 0.75),
    "S_fallback_twice": (0, 0.75), "S_8192": (1, 0.75), "S_800": (-1, 0.75), "F": (-3, -0.5), "SF": (-2, 0),
    "SF_mean": (-2, 0), "SF_blocks": (-2, 0), "P4_mean": (-2, 0), "S75F25": (-1, 0.4), "P4": (-2, 0.1), "P8": (-1, 0.4),
    "FN": (-4, 0.5), "FI": (-9, -1.2), "FN75FI25": (-6, 0), "kl_shampoo": (-1, 0.5), "soap": (-1, 0.5),
    "shampoo": (-1, 0.4), "ekfac": (-1, 0.4), "tekfac": (-1, 0.5), "tkfac": (0, 0.5), "foof": (0, 0.1),
    "muon": (-4, 0.3), "adamw": (-7, 0.2), "kl_shampoo_SF": (-3, 0), "soap_SF": (-3, 0), "shampoo_SF": (-3, 0),
    "tekfac_SF": (-3, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    variant: str
    width: int
    seed: int
    least: int = 5  # points

    def wanted(self, done: dict[int, float], running: set[int], hint: int | None) -> list[int]:
        """The steps of the grid to be run now, most useful first; none while what is under way decides."""
        if len(done) + len(running) >= 10:
            return []
        start, slope = CENTRES[self.variant]
        centre = hint if hint is not None else round(start + slope * math.log2(self.width / BASE))
        first = [centre, centre + 2, centre - 2]
        missing = [step for step in first if step not in done and step not in running]
        if missing:
            return missing
        if any(step in running for step in first):
            return []
        best = min(done, key=lambda step: done[step])
        if math.isinf(done[best]):
            wanted = [min(done) - 3]
        else:
            # Once the neighbours are known the best may be another.
            near = [best - 1, best + 1]
            far = [best - 2, best + 2] if self.least >= 5 else []
            outer = [step for step in (best - 2, best + 2) if not min(done) <= step <= max(done)]
            wanted = [*outer, *near, *far]
        return [step for step in dict.fromkeys(wanted) if step not in done and step not in running]


def plan() -> list[Curve]:
    """The curves, most informative first."""
    curves: list[Curve] = []

    def add(names: str, widths: str, seeds: str = "0") -> None:
        for seed in map(int, seeds.split()):
            for name in names.split():
                curves.extend(Curve(name, int(width), seed) for width in widths.split())

    # What separates the causes, at the ends of the range.
    add("S", "1024 64 256")
    add("SF P4 S_blocks S_mean", "1024 64 256")
    add("S75F25 F", "1024 64")
    add("S_fallback_half S_fallback_twice S_eps1e-2", "512 64")
    add("FN75FI25 FN", "512 64")
    # The other methods, at widths that they are quick at.
    add("muon kl_shampoo adamw", "512 64")
    add("S SF P4", "512 128 1024 64 256", "1")
    add("soap shampoo tekfac", "512 64")
    add("P4_mean SF_mean SF_blocks", "512 64")
    add("S SF P4", "512 128")
    add("S SF P4", "1024 64 256 512 128", "2")
    add("S_8192 S_spectral P8 S_root", "512 64")
    add("kl_shampoo_SF soap_SF shampoo_SF tekfac_SF", "512 64")
    add("muon adamw kl_shampoo", "1024 256 128")
    add("S_exact", "512")
    add("FI S_800 S_eps1e-4 tkfac foof ekfac", "512 64")
    add("S_blocks S_mean S75F25", "64 512", "1 2")
    add("muon kl_shampoo adamw soap shampoo tekfac", "64 512", "1 2")
    return list(dict.fromkeys(curve for curve in curves if curve.width != BASE or curve.variant not in SAME_AT_BASE))


class Plan:
    """Hands out runs and takes results."""

    def __init__(self, curves: list[Curve], results: list[dict[str, Any]]) -> None:
        self.curves = curves
        self.done: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
        self.running: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        self.durations: dict[tuple[str, int], list[float]] = defaultdict(list)
        for result in results:
            self.take(result)

    def take(self, result: dict[str, Any]) -> None:
        key = result["variant"], result["width"], result["seed"]
        loss = result["loss"]
        self.done[key][result["step"]] = math.inf if loss is None else loss
        self.running[key].discard(result["step"])
        if loss is not None:
            self.durations[result["variant"], result["width"]].append(result["seconds"])

    def expected(self, variant: str, width: int) -> float:
        known = self.durations.get((variant, width))
        if known:
            return max(known[-5:])
        method = VARIANTS[variant].method
        alike = [max(d) for (name, w), d in self.durations.items() if w == width and VARIANTS[name].method == method]
        return max(alike) if alike else 0.0

    def next(self, left: float) -> Run | None:
        """The next run that should end within `left` seconds."""
        for curve in self.curves:
            key = curve.variant, curve.width, curve.seed
            if self.expected(curve.variant, curve.width) > left:
                continue
            hint = None
            first = self.done.get((curve.variant, curve.width, 0))
            if curve.seed and first:
                hint = min(first, key=lambda step: first[step])
            wanted = curve.wanted(self.done[key], self.running[key], hint)
            if wanted:
                self.running[key].add(wanted[0])
                return Run(curve.variant, curve.width, wanted[0], curve.seed)
        return None


# Workers.


def load(folder: Path) -> dict[str, Any]:
    return {
        "train": np.load(folder / "train.npy"),
        "eval": np.load(folder / "eval.npy"),
        "config": json.loads((folder / "config.json").read_text()),
    }


def work(number: int, inbox: Any, outbox: Any, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = load(options.data)
    patch()
    while True:
        run = inbox.get()
        if run is None:
            return
        try:
            steps = 1 if run.seed < 0 else options.steps
            outbox.put((number, run, train(run, data, options.device, tf32=options.tf32, steps=steps)))
        except TrainingDivergedError:
            numbers = {"rate": run.rate, "method": VARIANTS[run.variant].method, "loss": None, "diverged": True}
            outbox.put((number, run, {**asdict(run), **numbers, "seconds": 0.0}))
        except Exception:  # noqa: BLE001 - a run that fails ends no other
            outbox.put((number, run, traceback.format_exc()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--steps", type=int, help="fewer, to try the program")
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--first", nargs="*", default=[], help="curves before the plan's: SF:64,1024:1,2 and so on")
    parser.add_argument("--tf32", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    torch.set_num_threads(1)
    print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)
    # A device that the parent has asked for is lost to a fork.
    context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    outbox = context.Queue()
    inboxes = [context.Queue() for _ in range(options.workers)]
    processes = [
        context.Process(target=work, args=(i, inbox, outbox, options), daemon=True) for i, inbox in enumerate(inboxes)
    ]
    for process, inbox in zip(processes, inboxes, strict=True):
        process.start()
        inbox.put(Run("S", 64, 0, -1))  # warms up
    curves = [Curve(name, int(width), int(seed))
              for part in options.first
              for name, widths, seeds in [part.split(":")]
              for seed in seeds.split(",") for width in widths.split(",")]  # fmt: skip
    todo = Plan(list(dict.fromkeys([*curves, *plan()])), results)
    busy, idle, count, started = set(range(options.workers)), set(), 0, time.monotonic()
    with path.open("a", encoding="utf-8") as file:
        while time.monotonic() < deadline:
            for number in sorted(idle):
                run = todo.next(deadline - time.monotonic()) if count < options.runs else None
                if run is None:
                    break
                count += 1
                idle.discard(number)
                busy.add(number)
                inboxes[number].put(run)
            if not busy:
                break
            try:
                number, run, result = outbox.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                dead = [i for i in busy if not processes[i].is_alive()]
                for i in dead:
                    print(f"worker {i} has died with {processes[i].exitcode}", flush=True)
                    busy.discard(i)
                continue
            busy.discard(number)
            idle.add(number)
            if isinstance(result, str):
                print(f"FAILED {run}\n{result}", flush=True)
                if run.seed >= 0:  # as if it had diverged, or the curve would wait for it
                    todo.take({**asdict(run), "loss": None})
                continue
            if run.seed < 0:
                print(f"worker {number} is warm after {time.monotonic() - started:.1f} s", flush=True)
                continue
            file.write(json.dumps(result) + "\n")
            file.flush()
            todo.take(result)
            loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
            print(
                f"{time.monotonic() - started:6.1f} {run.variant} {run.width} {run.rate:.4f} seed {run.seed}:"
                f" {loss}, {result['seconds']:.1f} s",
                flush=True,
            )
    for process in processes:
        process.kill()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
