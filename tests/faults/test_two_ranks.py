"""Faults on one of two ranks: both go on alike, or the one that is left gets an error within its time limit."""

from __future__ import annotations

import collections
import json
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import two_ranks
from starting import end, start, wait

from hf_so2 import OPTIMIZERS

NAMES = tuple(OPTIMIZERS)
SEEDS = 3  # of every name and fault, in the long selection


def go_wrong(names: tuple[str, ...], seeds: range, folder: Path, patience: float) -> None:
    faults = [(name, fault, seed) for fault in two_ranks.FAULTS for name in names for seed in seeds]
    wait(start(two_ranks.many, folder, faults), patience)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    print(f"\n{len(faults)} faults on one of two ranks: {dict(collections.Counter(map(tuple, first)))}")


def leave(name: str, fault: str, seed: int, folder: Path) -> str:
    """What the rank that is left has met."""
    ranks = start(two_ranks.left_alone, folder, name, fault, seed)
    limit = time.monotonic() + 60.0
    try:
        while not (written := list(folder.glob("*.json"))) and time.monotonic() < limit:
            assert any(rank.is_alive() for rank in ranks), (name, fault, seed)
            time.sleep(0.02)
        assert written, (name, fault, seed)
        (path,) = written
        ranks[int(path.stem)].join(20.0)
        assert ranks[int(path.stem)].exitcode == 0
        if fault != "stalls":
            ranks[1 - int(path.stem)].join(20.0)
            assert ranks[1 - int(path.stem)].exitcode == (1 if fault == "raises" else -signal.SIGKILL)
    finally:
        end(ranks)
    met, where = json.loads(path.read_text()), (name, fault, seed)
    assert met["seconds"] < 2 * two_ranks.LIMIT, where
    assert met.get("message"), where
    # Weights are those after a whole number of steps, or nobody may save them.
    assert not met["differ"] or met.get("refuses"), (where, met)
    for note in met["notes"]:
        assert "checkpoint" in note, (where, met)
        assert "training can go on" not in note, (where, met)
    return "in a step" if met["notes"] else "between steps"


@pytest.mark.slow
def test_many_faults_on_one_rank(tmp_path: Path) -> None:
    go_wrong(NAMES, range(1, SEEDS + 1), tmp_path / "ranks", 1500.0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", two_ranks.LEAVES)
def test_a_rank_that_is_left_alone_gets_an_error_in_time(fault: str, tmp_path: Path) -> None:
    outcomes = collections.Counter(leave(name, fault, 1, tmp_path / name) for name in NAMES)
    print(f"\n{outcomes.total()} ranks left alone by one that {fault}: {dict(outcomes)}")
