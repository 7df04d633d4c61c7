"""Faults in a plain loop: the run goes on as without the step, or with a finite one; never with anything poisoned."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from plain_loop import FAULTS, run

from hf_so2.methods.table import METHODS

NAMES = tuple(METHODS)
FEW = ("kfac", "ekfac", "soap", "muon", "adamw")
SEEDS = 12  # of every name and fault, in the long selection


def counted(fault: str, seeds: range, names: tuple[str, ...] = NAMES) -> None:
    outcomes = collections.Counter(run(name, fault, seed) for name in names for seed in seeds)
    print(f"\n{fault}: {outcomes.total()} faults, {dict(outcomes)}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_few_faults(fault: str) -> None:
    counted(fault, range(1), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_many_faults(fault: str) -> None:
    counted(fault, range(1, SEEDS + 1))
