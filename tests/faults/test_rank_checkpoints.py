"""Damage to checkpoints that two ranks have written: both refuse them by the same words, and pass over them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import rank_checkpoints
from starting import start, wait

MANY, RESUMED = 200, 12
OF_ONE = 20.0  # seconds for one damage


def refuse_and_pass_over(way: str, count: int, resumed: int, folder: Path) -> None:
    wait(start(rank_checkpoints.damaged, folder, way, count, resumed), 60.0 + OF_ONE * count)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    outcomes, trained_on = first
    print(f"\n{count} damaged checkpoints of two ranks ({way}) refused, {trained_on} gone on from: {outcomes}")


def test_a_damaged_checkpoint_of_two_ranks_is_refused_by_both(tmp_path: Path) -> None:
    refuse_and_pass_over("DDP", 30, 1, tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize("way", rank_checkpoints.WAYS)
def test_many_damaged_checkpoints_of_two_ranks(way: str, tmp_path: Path) -> None:
    refuse_and_pass_over(way, MANY, RESUMED, tmp_path / "ranks")
