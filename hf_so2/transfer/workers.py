"""Tasks side by side in worker processes that never outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch

from hf_so2.errors import ConfigurationError

Task = TypeVar("Task")


def run_tasks(
    run: Callable[[Task], None], tasks: Iterable[Task], jobs: int, deadline: float | None = None
) -> Iterator[Task]:
    """Runs the tasks, `jobs` at a time, and yields each when it is done.

    With several jobs each worker has an equal share of the cores and, in turn, one of the visible GPUs.

    Args:
        run: called with a task; picklable when there are several jobs.
        tasks: in the order in which to start them.
        jobs: 1 runs them in this process.
        deadline: `time.monotonic()` after which no task is started.

    Raises:
        ConfigurationError: a worker was killed from outside.
        Exception: whatever `run` raises.
    """
    in_time = (task for task in tasks if deadline is None or time.monotonic() < deadline)
    if jobs == 1:
        for task in in_time:
            run(task)
            yield task
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    pool = ProcessPoolExecutor(jobs, context, initializer=_prepare_worker, initargs=(numbers, jobs))
    running: dict[Future[None], Task] = {}
    try:
        while True:
            running |= {pool.submit(run, task): task for task in islice(in_time, jobs - len(running))}
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
        pool.shutdown()
    except BrokenProcessPool:
        raise ConfigurationError("jobs", jobs, "a worker was killed, probably for lack of memory; try fewer") from None
    finally:
        # After an error or Ctrl-C nobody waits for what is half done: it runs again next time.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _prepare_worker(numbers: SimpleQueue[int], jobs: int) -> None:
    number = numbers.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    # Counting does not touch the devices, so the choice still holds when the first tensor moves there.
    devices = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    devices = devices or [str(index) for index in range(torch.cuda.device_count())]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
