"""Starts two ranks of a program in this folder, waits for them no longer than allowed, and leaves neither behind."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def start(target: Callable[..., None], folder: Path, *arguments: Any) -> list[BaseProcess]:
    # A server that has imported everything: each start takes a tenth of a second, not ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_ranks", "hf_so2", "transformers.models.llama.modeling_llama"])
    folder.mkdir(parents=True)
    ranks = [context.Process(target=target, args=(rank, folder, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def wait(ranks: list[BaseProcess], seconds: float) -> None:
    """Both end well within this time, or the test fails."""
    limit = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.join(max(limit - time.monotonic(), 0.1))
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        end(ranks)


def end(ranks: list[BaseProcess]) -> None:
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()
