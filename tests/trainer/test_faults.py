"""Several gloo ranks: checkpoints that any number of them can go on from, and one rank that goes wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import optimizer_of
from launching import ACCELERATE, TORCHRUN, launch

sys.path.insert(0, str(Path(__file__).parent))
import faults_program

from hf_so2 import checkpoints

PROGRAM = Path(faults_program.__file__)


def run(scenario: str, output: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """What each rank ended with."""
    code, log = launch(TORCHRUN, ranks, PROGRAM, scenario, output)
    assert code == 0, log[-3000:]
    return [torch.load(output / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_equal(first: Any, second: Any) -> None:
    """Bit for bit, whatever the nesting."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("two-ranks")
    return output, run("resume_at_once", output)


def test_two_ranks_resume_bit_for_bit(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = two_ranks
    assert_equal(first["resumed"]["parameters"], first["whole"]["parameters"])
    assert_equal(first["resumed"]["curvature"], first["whole"]["curvature"])
    assert_equal(first["resumed"]["losses"], first["whole"]["losses"])
    assert_equal(first["whole"]["parameters"], second["whole"]["parameters"])
    assert_equal(first["whole"]["curvature"], second["whole"]["curvature"])
    assert_equal(second["resumed"]["parameters"], first["resumed"]["parameters"])
    assert_equal(second["resumed"]["curvature"], first["resumed"]["curvature"])


def test_each_rank_writes_its_own_layers(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    output, (first, _) = two_ranks
    folder = output / "whole" / "checkpoint-6"
    assert checkpoints.world_size_of(folder) == 2
    shares = [torch.load(folder / f"curvature-{rank}-of-2.pt", weights_only=True) for rank in (0, 1)]
    layers = [set(share["curvature"]["layers"]) for share in shares]
    assert all(layers)
    assert not layers[0] & layers[1]
    assert layers[0] | layers[1] == set(first["whole"]["curvature"]["curvature"]["layers"])
    whole = checkpoints.read_curvature(folder)
    assert_equal(whole, first["whole"]["curvature"])
    (folder / "curvature-1-of-2.pt").unlink()
    assert checkpoints.fault_of(folder) == "curvature-1-of-2.pt is missing"


def continue_alone(output: Path, two_ranks: tuple[Path, list[dict[str, Any]]]) -> Any:
    return faults_program.train(output, 1, resume=str(two_ranks[0] / "whole" / "checkpoint-2"))


def test_one_process_goes_on_from_two(
    two_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = continue_alone(tmp_path, two_ranks)
    assert faults_program.losses(trainer) == pytest.approx(two_ranks[1][0]["whole"]["losses"], abs=1e-6)
    assert optimizer_of(trainer).steps == 6
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_so2")]
    assert "was saved by 2 process(es) and 1 go on" in message


@pytest.mark.slow
def test_four_ranks_go_on_from_one_that_went_on_from_two(
    two_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    continue_alone(tmp_path / "one", two_ranks)
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "checkpoint")
    ranks = run("resume_from", tmp_path, ranks=4)
    for rank in ranks:
        assert rank["resumed"]["losses"] == pytest.approx(two_ranks[1][0]["whole"]["losses"], abs=1e-6)
        assert_equal(rank["resumed"]["parameters"], ranks[0]["resumed"]["parameters"])


def test_what_goes_wrong_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    """In the first of two micro-batches, which no rank hears of before the second is reduced."""
    first, second = run("go_wrong", tmp_path)
    assert_equal(first, second)
    counters = {name: state["curvature"] for name, state in first.items()}
    assert [(c["steps"], c["skipped_steps"]) for c in counters.values()] == [(5, 1), (6, 0)]
    assert [c["curvature"]["dropped_statistics"] for c in counters.values()] == [0, 1]
    updates = {name: layer["updates"] for name, layer in counters["overflow"]["curvature"]["layers"].items()}
    assert {name for name, count in updates.items() if count == 5} == {"model.layers.0.mlp.down_proj.weight"}
    assert set(updates.values()) == {5, 6}
    for state in first.values():
        assert all(torch.isfinite(tensor).all() for tensor in state["parameters"].values())


def test_a_rank_that_raises_ends_the_job_with_its_error(tmp_path: Path) -> None:
    """A hang is a failure of this test: the launcher is given a minute, of which it needs a few seconds."""
    code, log = launch(ACCELERATE, 2, PROGRAM, "raise_on_one", tmp_path, timeout=60)
    assert code != 0
    assert "RuntimeError: rank 1 has a problem" in log
    assert not list(tmp_path.glob("rank-*.pt"))


@pytest.mark.slow
def test_a_rank_killed_in_a_save_loses_that_save_alone(
    two_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    code, _ = launch(ACCELERATE, 2, PROGRAM, "die_in_a_save", tmp_path, timeout=60)
    assert code != 0
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    assert checkpoints.to_resume(True, tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = faults_program.train(tmp_path, 1, resume=True)
    assert faults_program.losses(trainer) == pytest.approx(two_ranks[1][0]["whole"]["losses"], abs=1e-6)
