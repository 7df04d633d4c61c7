"""Faults on one of two ranks under the Trainer: both go on alike, or what they are started anew from is as it was."""

from __future__ import annotations

import collections
import json
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import trainer_ranks
import two_ranks
from starting import end, start, wait

from hf_so2 import OPTIMIZERS
from hf_so2.training import checkpoints

NAMES = tuple(OPTIMIZERS)
FEW = ("kfac_mup",)
SEEDS = 2  # of every name and fault, in the long selection
OF_ONE = 60.0  # seconds for one fault


Drawn = tuple[str, str, int]
FOUND: list[Drawn] = [("shampoo", "lapack", 1)]  # one rank left an update out that the other made


def drawn(names: tuple[str, ...], seeds: range) -> list[Drawn]:
    return [(name, fault, seed) for fault in trainer_ranks.BOTH_GO_ON for name in names for seed in seeds]


def go_wrong(faults: list[Drawn], folder: Path) -> None:
    wait(start(trainer_ranks.many, folder, faults), OF_ONE * len(faults))
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    print(f"\n{len(faults)} faults on one of two ranks: {dict(collections.Counter(map(tuple, first)))}")


def test_a_few_faults_on_one_rank(tmp_path: Path) -> None:
    go_wrong([*drawn(FEW, range(1)), *FOUND], tmp_path / "ranks")


@pytest.mark.slow
def test_many_faults_on_one_rank(tmp_path: Path) -> None:
    go_wrong(drawn(NAMES, range(1, SEEDS + 1)), tmp_path / "ranks")


def leave(name: str, fault: str, seed: int, folder: Path) -> str:
    """What the rank that is left has met, and whether both, started anew, end as if nothing had been."""
    output, where = folder / "output", (name, fault, seed)
    ranks = start(trainer_ranks.left_alone, folder / "alone", output, name, fault, seed)
    limit = time.monotonic() + OF_ONE
    try:
        while not (written := list((folder / "alone").glob("*.json"))) and time.monotonic() < limit:
            assert any(rank.is_alive() for rank in ranks), where
            time.sleep(0.02)
        assert written, where
        (path,) = written
        gone = ranks[1 - int(path.stem)]
        if fault != "stalls":
            gone.join(20.0)
            assert gone.exitcode == (1 if fault == "raises" else -signal.SIGKILL), where
    finally:
        end(ranks)
    met = json.loads(path.read_text())
    assert met["message"], where
    assert all("training can go on" not in note for note in met["notes"]), (where, met)
    torn = any(checkpoints.fault_of(checkpoint) for checkpoint in output.glob("checkpoint-*"))
    wait(start(trainer_ranks.go_on, folder / "again", output, name, fault, seed), OF_ONE)
    return "with a torn checkpoint" if torn else "between two checkpoints"


@pytest.mark.slow
@pytest.mark.parametrize("fault", two_ranks.LEAVES)
def test_what_a_rank_leaves_behind_is_gone_on_from(fault: str, tmp_path: Path) -> None:
    outcomes = collections.Counter(leave(name, fault, 1, tmp_path / name) for name in NAMES[::3])
    print(f"\n{outcomes.total()} runs that one rank left ({fault}): {dict(outcomes)}")
