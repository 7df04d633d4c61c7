"""Sharded tensors: FSDP2's parameters, their gradients and tensors of the same shape. Every rank has a part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_so2.errors import ConfigurationError

SUPPORTED = "is not supported; of several processes only DDP and FSDP2 over all ranks are (no tensor parallelism)"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor, as under FSDP2 and tensor parallelism."""
    return isinstance(tensor, _sharded_types())


@lru_cache  # called for every parameter at every step
def _sharded_types() -> tuple[type, ...]:
    if not dist.is_available():
        return ()
    from torch.distributed.tensor import DTensor  # missing in a torch built without torch.distributed

    return (DTensor,)


# A sub-tensor, as the arguments of `Tensor.narrow`: dimension, start and length.
Window = tuple[int, int, int]


def local(tensor: Tensor, window: Window | None = None) -> Tensor:
    """This rank's part, possibly empty, as a view that writes through. The tensor itself if it is not sharded.

    Args:
        tensor: the tensor.
        window: of this sub-tensor alone.
    """
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    if window is None:
        return part
    dim, start, length = window
    if is_sharded(tensor) and dim == (split := split_of(tensor)).dim:
        first, last = split.bounds(dist.get_rank())
        start, stop = (min(max(edge, first), last) - first for edge in (start, start + length))
        length = stop - start
    return part.narrow(dim, start, length)


@dataclass(frozen=True)
class Split:
    """Which rank has which part.

    The parts are chunks of ⌈n/parts⌉ along one dimension of length n, as in `torch.chunk`. The last chunk that is not
    empty may be shorter. All chunks after it are empty.

    Args:
        shape: shape of the whole tensor.
        dim: the dimension.
        copies: for each copy of the whole tensor, the ranks of its parts in order. FSDP2 has one copy, HSDP as many as
            replicas.
        start: where the tensor begins, along the dimension, in a larger one that was cut into the chunks.
        total: length of this larger one; None if it is the tensor itself.
    """

    shape: tuple[int, ...]
    dim: int
    copies: tuple[tuple[int, ...], ...]
    start: int = 0
    total: int | None = None

    def copy_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that together have the whole tensor, `rank` included."""
        return next(copy for copy in self.copies if rank in copy)

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """The rank's part of the whole tensor: a view."""
        start, stop = self.bounds(rank)
        return whole.narrow(self.dim, start, stop - start)

    def bounds(self, rank: int) -> tuple[int, int]:
        """Where the rank's part starts and stops along the dimension; equal if it has nothing."""
        copy, length = self.copy_of(rank), self.shape[self.dim]
        chunk = -(-(length if self.total is None else self.total) // len(copy))
        start = copy.index(rank) * chunk - self.start
        return min(max(start, 0), length), min(max(start + chunk, 0), length)

    def narrowed(self, dim: int, start: int, length: int) -> Split:
        """How the sub-tensor `narrow(dim, start, length)` is spread: each rank has what it has of it."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        if dim != self.dim:
            return replace(self, shape=shape)
        total = self.shape[dim] if self.total is None else self.total
        return replace(self, shape=shape, start=self.start + start, total=total)

    def home(self, replica: int) -> int | None:
        """The rank that has all of the tensor, in one of the copies; None if no rank has. Replicas count modulo."""
        everything = (0, self.shape[self.dim])
        copy = self.copies[replica % len(self.copies)]
        return next((rank for rank in copy if self.bounds(rank) == everything), None)

    def part_shape(self, rank: int) -> torch.Size:
        return self.part(torch.empty(self.shape, device="meta"), rank).shape


def split_of(tensor: Tensor) -> Split:
    """How a tensor is spread over the ranks. A tensor that is not sharded has a copy on each rank.

    Raises:
        ConfigurationError: something other than FSDP2 has sharded the tensor, or it is not spread over all ranks.
    """
    if not is_sharded(tensor):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return Split(tuple(tensor.shape), 0, tuple((rank,) for rank in range(ranks)))
    return _split(tensor)


def _split(tensor: Any) -> Split:
    mesh, (*others, last) = tensor.device_mesh, tensor.placements
    # FSDP2 shards along the last dimension of its mesh. HSDP also copies along the dimension before.
    by_fsdp = last.is_shard() and all(placement.is_replicate() for placement in others)
    if not by_fsdp or mesh.size() != dist.get_world_size() or "tp" in (mesh.mesh_dim_names or ()):
        raise ConfigurationError("model", f"a parameter with {tensor.placements} on {mesh}", SUPPORTED)
    if tensor.to_local().device.type != mesh.device_type:
        raise ConfigurationError("model", "parameters offloaded to the host", "are not supported; keep them on the GPU")
    return Split(tuple(tensor.shape), last.dim, _copies(mesh))


@lru_cache
def _copies(mesh: Any) -> tuple[tuple[int, ...], ...]:
    ranks = mesh.mesh
    return tuple(tuple(copy) for copy in ranks.reshape(-1, ranks.shape[-1]).tolist())


def refuse_other_sharding(model: nn.Module) -> None:
    """Raise if parameters are DTensors that FSDP2 has not made.

    Raises:
        ConfigurationError: one line that says what is supported.
    """
    sharded = [(name, parameter) for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if not sharded:
        return
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigurationError("model", f"{sharded[0][0]}, a DTensor without fully_shard", SUPPORTED)
    for _, parameter in sharded:
        split_of(parameter)


def is_offloading(policy: object) -> bool:
    """Whether `policy` is the policy of FSDP2 that keeps parameters in host memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(policy, CPUOffloadPolicy)
