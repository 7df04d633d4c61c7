"""Faults in the Trainer: what goes on is bit for bit the run without them, or finite; what stops can be resumed."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from trainer_run import FAULTS, run

from hf_so2 import OPTIMIZERS

NAMES = tuple(OPTIMIZERS)
FEW = ("kfac_mup", "soap")
SEEDS = 2  # of every name and fault, in the long selection


def counted(fault: str, seeds: range, names: tuple[str, ...], output: Path) -> None:
    outcomes = collections.Counter(run(name, fault, seed, output / f"{name}-{seed}") for name in names for seed in seeds)
    print(f"\n{fault}: {outcomes.total()} faults in the Trainer, {dict(outcomes)}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_few_faults(fault: str, tmp_path: Path) -> None:
    counted(fault, range(1), FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_many_faults(fault: str, tmp_path: Path) -> None:
    counted(fault, range(1, SEEDS + 1), NAMES, tmp_path)
