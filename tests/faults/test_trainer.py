"""Faults in the Trainer: what goes on is bit for bit the run without them, or finite; what stops can be resumed."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from trainer_acts import FAULTS
from trainer_run import run, run_out_of_memory

from hf_so2 import OPTIMIZERS

NAMES = tuple(OPTIMIZERS)
FEW = ("kfac_mup",)
SEEDS = 2  # of every name and fault, in the long selection


def counted(fault: str, seeds: range, names: tuple[str, ...], output: Path) -> None:
    outcomes = collections.Counter(
        run(name, fault, seed, output / f"{name}-{seed}") for name in names for seed in seeds
    )
    print(f"\n{fault}: {outcomes.total()} faults in the Trainer, {dict(outcomes)}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_few_faults(fault: str, tmp_path: Path) -> None:
    counted(fault, range(1), FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_many_faults(fault: str, tmp_path: Path) -> None:
    counted(fault, range(1, SEEDS + 1), NAMES, tmp_path)


def memory_counted(seeds: range, names: tuple[str, ...], output: Path) -> None:
    outcomes = collections.Counter(
        run_out_of_memory(name, seed, output / f"{name}-{seed}") for name in names for seed in seeds
    )
    print(f"\nout of memory: {outcomes.total()} faults in the Trainer, {dict(outcomes)}")


def test_memory_that_runs_out_starts_anew_with_smaller_batches(tmp_path: Path) -> None:
    memory_counted(range(1), FEW, tmp_path)


@pytest.mark.slow
def test_memory_runs_out_often(tmp_path: Path) -> None:
    memory_counted(range(1, 2 * SEEDS + 1), NAMES, tmp_path)
