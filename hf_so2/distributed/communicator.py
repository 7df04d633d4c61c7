"""All collectives of the package. In a single process each of them does nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up every tensor over all ranks, in place.

    One collective per dtype, whatever the number of tensors. Every rank has to pass the same shapes in the same order.
    """
    if world()[1] > 1:
        _in_buckets(tensors, dist.all_reduce)


def send_from_owners(tensors: Sequence[tuple[Tensor, int]]) -> None:
    """Overwrite every tensor with the copy of the rank that owns it.

    One collective per owner and dtype. Every rank has to pass the same shapes and owners in the same order.

    Args:
        tensors: (tensor, rank of its owner).
    """
    _, ranks = world()
    if ranks > 1:
        for rank in range(ranks):
            owned = [tensor for tensor, owner in tensors if owner == rank]
            _in_buckets(owned, partial(dist.broadcast, src=rank))


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run a collective on all tensors of a dtype at once, joined end to end."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for same in by_dtype.values():
        bucket = torch.cat([tensor.reshape(-1) for tensor in same])
        collective(bucket)
        for tensor, part in zip(same, bucket.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))
