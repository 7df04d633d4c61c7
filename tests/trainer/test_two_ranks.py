"""Two gloo ranks with half of each batch train as one process does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured_factors, llama, optimizer_of, relative_error, token_rows, trained

PROGRAM = Path(__file__).with_name("ranks_program.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def launch(launcher: list[str], output: Path) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(PROGRAM), str(output)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        log, _ = process.communicate(timeout=120)
    finally:
        # The launcher's children outlive it if it is killed alone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log[-3000:]
    return [torch.load(output / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([*TORCHRUN, "--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"], id="torchrun"),
        pytest.param([*ACCELERATE, "--main_process_port", "0"], id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_process(launcher: list[str], tmp_path: Path) -> None:
    """Two ranks times two micro-batches of four equal one batch of sixteen; both ranks end with equal parameters."""
    first, second = launch(launcher, tmp_path)
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name
    for name, factors in first["factors"].items():
        assert all(torch.equal(factors[key], second["factors"][name][key]) for key in factors), name

    alone = trained(llama(), token_rows(padded=True), tmp_path, damping=1e-2)
    for name, expected in captured_factors(optimizer_of(alone)).items():
        for key, value in expected.items():
            assert relative_error(first["factors"][name][key], value) < 1e-5, (name, key)
    for name, expected_parameter in alone.model.state_dict().items():
        assert relative_error(first["parameters"][name], expected_parameter) < 1e-5, name
