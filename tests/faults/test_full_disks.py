"""A disk that is full at a random moment of a run that saves at every step: one line, then on as without it."""

from __future__ import annotations

import collections
import contextlib
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, assert_same_parameters, llama, token_rows, trained
from transformers import TrainerCallback

import hf_so2
from hf_so2.training import checkpoints

RUN = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}
ROWS = token_rows(16)
FEW, MANY = 2, 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> hf_so2.SecondOrderTrainer:
    return trained(llama(), ROWS, tmp_path_factory.mktemp("whole"), **RUN)


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


class FilesEnd(TrainerCallback):
    """From a random step on no file can be longer than so many bytes: half of it is written, as on a full disk."""

    def __init__(self, chance: random.Random, largest: int) -> None:
        self.at, self.most = chance.randrange(RUN["max_steps"]), chance.randrange(largest)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:  # Python ignores the signal that comes with it
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.before[1]))

    def undo(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def train_until_full(output: Path, callback: TrainerCallback | None) -> bool:
    """Whether the disk was full before the run's end."""
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(), args=arguments(output, **RUN), train_dataset=ROWS, callbacks=[callback] if callback else None
    )
    message = ""
    try:
        trainer.train()
    except hf_so2.ConfigurationError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        assert message.startswith("output_dir=")
        assert "cannot be written to" in message
    return bool(message)


def go_on(output: Path, whole: Any) -> str:
    if all(checkpoints.fault_of(path) for path in output.glob("checkpoint-*")):
        with pytest.raises(hf_so2.ConfigurationError, match="no complete checkpoint"):
            checkpoints.to_resume("last", output)
        return "before the first complete checkpoint"
    resumed = trained(llama(), ROWS, output, resume="last", **RUN)
    assert_same_parameters(resumed.model, whole.model)
    return "gone on from the last complete one"


@pytest.mark.parametrize("size", [40, 400])
def test_what_torchs_writer_says_of_a_full_disk_is_understood_wherever_it_is(size: int, tmp_path: Path) -> None:
    """It has no error of its own, and another text at the end of a file than within."""
    state, path = {str(index): torch.ones(size) for index in range(5)}, tmp_path / "optimizer.pt"
    torch.save(state, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in range(0, path.stat().st_size, 37):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(hf_so2.ConfigurationError, match="cannot be written to"), checkpoints.writable(tmp_path):
                torch.save(state, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_in_a_save_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another") as caught, checkpoints.writable(tmp_path):
        raise RuntimeError("another reason")
    assert not isinstance(caught.value, hf_so2.ConfigurationError)


def test_files_that_end_early(whole: Any, tmp_path: Path) -> None:
    files_end(FEW, whole, tmp_path)


@pytest.mark.slow
def test_many_files_that_end_early(whole: Any, tmp_path: Path) -> None:
    files_end(MANY, whole, tmp_path)


def files_end(count: int, whole: Any, folder: Path) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    largest = max(sizes(Path(whole.args.output_dir)))
    for seed in range(count):
        output = folder / str(seed)
        limit = FilesEnd(random.Random(seed), largest)
        try:
            was_full = train_until_full(output, limit)
        finally:
            limit.undo()
        assert was_full, seed
        outcomes[go_on(output, whole)] += 1
        shutil.rmtree(output)
    print(f"\n{count} runs whose files ended early, {dict(outcomes)}")


@contextlib.contextmanager
def disk_of(size: int, folder: Path) -> Iterator[None]:
    """A real one in memory; skips where nobody but an administrator may have one."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_many_full_disks(whole: Any, tmp_path: Path) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    of_one = sum(sizes(Path(whole.args.output_dir, "checkpoint-4")))
    for seed in range(MANY):
        # Three checkpoints lie there for a moment, of which two stay.
        size = int(random.Random(seed).uniform(0.05, 3.0) * of_one)
        folder = tmp_path / str(seed)
        with disk_of(size, folder):
            was_full = train_until_full(folder / "output", None)
            subprocess.run(["mount", "-o", f"remount,size={20 * of_one}", str(folder)], check=True)
            outcomes[go_on(folder / "output", whole) if was_full else "never full"] += 1
    print(f"\n{MANY} runs on small disks: {dict(outcomes)}")
    assert outcomes["never full"] < MANY // 4
