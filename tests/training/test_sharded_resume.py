"""FSDP2: a checkpoint goes on with any number of ranks, as the run that was not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import relative_error
from shared.launching import TORCHRUN, launch

PROGRAM = Path(__file__).with_name("sharded_resume_program.py")


def run(ranks: int, output: Path, *resume: Path) -> list[dict[str, Any]]:
    """What each rank ended with, by scenario."""
    output.mkdir()
    code, log = launch(TORCHRUN, ranks, PROGRAM, output, *resume, timeout=600)
    assert code == 0, log[-3000:]
    return [torch.load(output / f"rank-{rank}-of-{ranks}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.slow
def test_two_ranks_then_one_then_two_and_four(tmp_path: Path) -> None:
    straight = run(2, tmp_path / "two")[0]
    ends = run(1, tmp_path / "one", tmp_path / "two" / "checkpoint-4")
    for ranks in (2, 4):
        ends += run(ranks, tmp_path / f"{ranks} again", tmp_path / "one" / "checkpoint-6")
    assert len(ends) == 1 + 2 + 4
    for end in ends:
        for name, found in end.items():
            expected = straight[name]
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6), name
            for parameter, value in found["parameters"].items():
                assert relative_error(value, expected["parameters"][parameter]) < 1e-10, (name, parameter)
