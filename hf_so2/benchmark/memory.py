"""Memory of an optimizer: what its state takes, and the most that training with it ever needs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested mappings, sequences and objects; storage that several share counts once."""
    storages = {
        (tensor.device, storage.data_ptr()): storage.nbytes()
        for tensor in _tensors(tree)
        if (storage := tensor.untyped_storage()).nbytes()
    }
    return sum(storages.values())


def _tensors(tree: Any) -> Iterable[Tensor]:
    pending, seen = [tree], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        elif hasattr(item, "__dict__") and not callable(item) and not isinstance(item, ModuleType | Enum):
            pending += vars(item).values()  # some peers keep objects of their own in the state


def peak_bytes(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """The result of `function`, and the most bytes of tensors that it held at a time.

    On a GPU the caching allocator counts; on the CPU the profiler sees every allocation of a tensor, which, unlike the
    size of the process, is the same in every run.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        return result, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    held = peak = 0
    for event in sorted(
        (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak
