"""Starts programs as several processes, as a user does, and leaves none of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--master_port=0", "--rdzv_endpoint=localhost:0", "--rdzv_backend=c10d"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--main_process_port=0"]


def launch(launcher: list[str], ranks: int, program: Path, *arguments: object, timeout: float = 300) -> tuple[int, str]:
    """The exit code and everything that was printed.

    Raises:
        subprocess.TimeoutExpired: the job was still running; it is not any more.
    """
    number = f"--num_processes={ranks}" if launcher[0] == ACCELERATE[0] else f"--nproc_per_node={ranks}"
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, number, str(program), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=timeout)
    finally:
        # The launcher's children outlive it if it is killed alone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, log
