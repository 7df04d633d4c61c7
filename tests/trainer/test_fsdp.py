"""FSDP2 through the Trainer: two ranks train, log, save and resume as one process does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from launching import TORCHRUN, launch

sys.path.insert(0, str(Path(__file__).parent))
import fsdp_program

PROGRAM = Path(fsdp_program.__file__)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two ranks wrote, and what each ended with."""
    output = tmp_path_factory.mktemp("fsdp")
    code, log = launch(TORCHRUN, 2, PROGRAM, output)
    assert code == 0, log[-3000:]
    return output, [torch.load(output / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", fsdp_program.SCENARIOS)
def test_two_ranks_train_and_log_as_one_process_does(
    job: tuple[Path, list[dict[str, Any]]], name: str, tmp_path: Path
) -> None:
    """Ten steps with accumulation, clipping, uneven shards, and padding and prompts of random length."""
    first, second = (rank[name] for rank in job[1])
    alone = fsdp_program.train(tmp_path, 1, **fsdp_program.SCENARIOS[name])
    for parameter, expected in fsdp_program.wholes(alone).items():
        assert torch.equal(first["parameters"][parameter], second["parameters"][parameter]), parameter
        assert relative_error(first["parameters"][parameter], expected) < 1e-10, parameter
    for logged, expected in zip(first["log"], fsdp_program.losses_and_curvature(alone), strict=True):
        assert logged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_a_run_goes_on_bit_for_bit(job: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    """With the model saved whole, and as shards."""
    for rank in job[1]:
        for parameter, straight in rank[name]["parameters"].items():
            assert torch.equal(rank[name]["resumed"][parameter], straight), parameter
