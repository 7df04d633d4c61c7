"""Several gloo ranks: checkpoints that any number of them can go on from, and one rank that goes wrong."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import optimizer_of
from shared.launching import ACCELERATE, TORCHRUN, launch

sys.path.insert(0, str(Path(__file__).parent))
import faults_program

from hf_so2 import SecondOrderTrainer
from hf_so2.training import checkpoints

PROGRAM = Path(faults_program.__file__)


@dataclass
class Job:
    """What several ranks left behind."""

    output: Path
    code: int
    log: str

    def results(self, scenario: str) -> list[dict[str, Any]]:
        paths = sorted(self.output.glob(f"{scenario}-*.pt"))
        assert paths, self.log[-3000:]
        return [torch.load(path, weights_only=True) for path in paths]


def run(launcher: list[str], ranks: int, output: Path, *scenarios: str) -> Job:
    return Job(output, *launch(launcher, ranks, PROGRAM, output, *scenarios))


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
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two ranks that train, resume, meet numbers that are none, and at last an error that rank 1 raises."""
    return run(ACCELERATE, 2, tmp_path_factory.mktemp("job"), "resume_and_go_wrong", "raise_on_one")


@pytest.fixture(scope="module")
def ranks(job: Job) -> list[dict[str, Any]]:
    results = job.results("resume_and_go_wrong")
    assert len(results) == 2
    return results


def test_ranks_end_equal(ranks: list[dict[str, Any]]) -> None:
    assert_equal(ranks[0], ranks[1])


def test_two_ranks_resume_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    assert_equal(ranks[0]["resumed"], ranks[0]["whole"])


def test_each_rank_writes_its_own_layers(job: Job, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = shutil.copytree(job.output / "whole" / "checkpoint-6", tmp_path / "checkpoint-6")
    assert checkpoints.world_size_of(folder) == 2
    shares = [torch.load(folder / f"curvature-{rank}-of-2.pt", weights_only=True) for rank in (0, 1)]
    layers = [set(share["curvature"]["layers"]) for share in shares]
    assert all(layers)
    assert not layers[0] & layers[1]
    assert_equal(checkpoints.read_curvature(folder), ranks[0]["whole"]["curvature"])
    (folder / "curvature-1-of-2.pt").unlink()
    assert checkpoints.fault_of(folder) == "curvature-1-of-2.pt is missing"


def continue_alone(output: Path, job: Job) -> SecondOrderTrainer:
    return faults_program.train(output, 1, resume=str(job.output / "whole" / "checkpoint-2"))


def test_one_process_goes_on_from_two(
    job: Job, ranks: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = continue_alone(tmp_path, job)
    assert faults_program.losses(trainer) == pytest.approx(ranks[0]["whole"]["losses"], abs=1e-6)
    assert len(faults_program.losses(trainer)) == optimizer_of(trainer).steps == 6
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_so2")]
    assert "was saved by 2 process(es) and 1 go on" in message


@pytest.mark.slow
def test_four_ranks_go_on_from_one_that_went_on_from_two(job: Job, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    continue_alone(tmp_path / "one", job)
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "checkpoint")
    four = run(TORCHRUN, 4, tmp_path, "resume").results("resume")
    assert len(four) == 4
    for rank in four:
        assert_equal(rank, four[0])
        assert rank["losses"] == pytest.approx(ranks[0]["whole"]["losses"], abs=1e-6)


def test_what_goes_wrong_on_one_rank_is_left_out_on_all(ranks: list[dict[str, Any]]) -> None:
    """In the first of two micro-batches, which the other rank hears nothing of before the second."""
    poisoned, overflowed = (ranks[0][name] for name in ("poison", "overflow"))
    counters = [state["curvature"] for state in (poisoned, overflowed)]
    assert [(c["steps"], c["skipped_steps"]) for c in counters] == [(5, 1), (6, 0)]
    assert [c["curvature"]["dropped_statistics"] for c in counters] == [0, 1]
    updates = {name: layer["updates"] for name, layer in overflowed["curvature"]["curvature"]["layers"].items()}
    assert {name for name, count in updates.items() if count == 5} == {"model.layers.0.mlp.down_proj.weight"}
    assert set(updates.values()) == {5, 6}
    for state in (poisoned, overflowed):
        assert all(torch.isfinite(tensor).all() for tensor in state["parameters"].values())


def test_a_rank_that_raises_ends_the_job_with_its_error(job: Job, ranks: list[dict[str, Any]]) -> None:
    """A hang would end in a timeout of the launcher instead."""
    assert len(ranks) == 2
    assert job.code != 0
    assert "RuntimeError: rank 1 has a problem" in job.log
    assert not list(job.output.glob("raise_on_one-*.pt"))


@pytest.mark.slow
def test_a_rank_killed_in_a_save_loses_that_save_alone(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    job = run(ACCELERATE, 2, tmp_path, "die_in_a_save")
    assert job.code != 0
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    assert checkpoints.to_resume(True, tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = faults_program.train(tmp_path, 1, resume=True)
    assert faults_program.losses(trainer) == pytest.approx(ranks[0]["whole"]["losses"], abs=1e-6)
