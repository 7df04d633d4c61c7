"""SIGKILL at a random moment of a run that saves at every step: what is left is gone on from as if nothing had been."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from shared.helpers import assert_same_parameters, llama, token_rows, trained

import hf_so2
from hf_so2.training import checkpoints

RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}
PATIENCE = 120.0  # seconds, after which it hangs
KILLS = 100


def train(output: Path) -> None:
    trained(llama(), token_rows(24), output, **RUN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> hf_so2.SecondOrderTrainer:
    return trained(llama(), token_rows(24), tmp_path_factory.mktemp("whole"), **RUN)


def kill(output: Path, chance: random.Random) -> bool:
    """Whether the process was still at it."""
    # A server that has imported everything: each death takes a second, not ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_so2", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=train, args=(output,))
    process.start()
    limit = time.monotonic() + PATIENCE
    while not (output / "checkpoint-2").is_dir() and process.is_alive():
        assert time.monotonic() < limit
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.3))  # what is left of the run takes about as long
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=PATIENCE)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def killed_runs(count: int, whole: Any, folder: Path) -> None:
    outcomes = {"killed": 0, "with a torn checkpoint": 0, "before the first complete one": 0}
    seeds = itertools.count()
    while outcomes["killed"] < count:
        seed = next(seeds)
        assert seed < 3 * count, outcomes
        output = folder / str(seed)
        outcomes["killed"] += kill(output, random.Random(seed))
        faults = [checkpoints.fault_of(path) for path in output.glob("checkpoint-*")]
        outcomes["with a torn checkpoint"] += any(faults)
        if all(faults):
            outcomes["before the first complete one"] += 1
            with pytest.raises(hf_so2.ConfigurationError, match="no complete checkpoint"):
                checkpoints.to_resume(True, output)
        else:
            resumed = trained(llama(), token_rows(24), output, resume=True, **RUN)
            assert_same_parameters(resumed.model, whole.model)
        shutil.rmtree(output)
    print(f"\n{next(seeds)} runs: {outcomes}; all others ended as without the kill")


@pytest.mark.slow
def test_many_killed_runs(whole: Any, tmp_path: Path) -> None:
    killed_runs(KILLS, whole, tmp_path)
