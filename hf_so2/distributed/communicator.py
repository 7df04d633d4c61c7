"""All collectives of the package."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up every tensor over all ranks, in place; nothing happens in a single process.

    One collective per dtype, whatever the number of tensors. Every rank has to pass the same shapes in the same order.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for same in by_dtype.values():
        bucket = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(bucket)
        for tensor, part in zip(same, bucket.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))
