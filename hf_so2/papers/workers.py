"""Independent runs side by side, one thread each."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def each(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> list[Result]:
    """`[function(job) for job in jobs]`, in so many processes; the results do not depend on how many.

    Args:
        function: may be a closure; what it reads is copied to the processes.
        jobs: its arguments.
        workers: 1 stays in this process.
    """
    quiet = _alone(function)
    if workers == 1:
        return [quiet(job) for job in jobs]
    from joblib import Parallel, delayed, parallel_config  # comes with scikit-learn, an extra

    with parallel_config(backend="loky", inner_max_num_threads=1), warnings.catch_warnings():
        # A process that has grown is replaced, and its job is done by the next one: nothing is lost.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given to the executor")
        results: list[Result] = Parallel(n_jobs=workers)(delayed(quiet)(job) for job in jobs)
    return results


def _alone(function: Callable[[Job], Result]) -> Callable[[Job], Result]:
    """One thread, since these matrices are small; and silent: trials are meant to go too far."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Result:
        threads, logger = torch.get_num_threads(), logging.getLogger("hf_so2")
        level = logger.level
        torch.set_num_threads(1)
        logger.setLevel(logging.ERROR)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(level)

    return wrapped
