"""All collectives of the package. In a single process each of them does nothing.

Every rank has to call the same ones in the same order, with tensors of the same shapes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_so2.distributed.assignment import Grid
from hf_so2.distributed.packing import Parcel
from hf_so2.distributed.shards import Split, Window, is_sharded, split_of

T = TypeVar("T")

# A bucket is a copy of its tensors. Larger buckets, or more of them at a time, cost memory and save no time.
BUCKET_BYTES = 64 * 2**20
BUCKETS_AT_A_TIME = 8


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up every tensor over all ranks, in place."""
    if world()[1] > 1:
        _run([(bucket, dist.all_reduce, {}) for bucket in _buckets(map(Parcel, tensors))])


def send_from_owners(parcels: Sequence[Parcel]) -> None:
    """Overwrite every tensor, on all ranks, with the owner's tensor."""
    if world()[1] > 1:
        _run([(bucket, dist.broadcast, {"src": bucket.owner}) for bucket in _buckets(parcels)])


def true_on_all_ranks(flag: Tensor) -> bool:
    """Whether a flag, 0-dim, is set on every rank."""
    down = flag.logical_not().to(torch.int64)
    sum_over_ranks([down])
    return not bool(down)


def gather_objects(mine: T) -> list[T]:
    """The objects of all ranks, in the order of ranks. They are pickled, so they should be small."""
    if world()[1] == 1:
        return [mine]
    found: list[Any] = [None] * world()[1]
    dist.all_gather_object(found, mine)
    return found


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, on every rank, out of the parts of all ranks. A collective if `like` is sharded.

    Args:
        part: this rank's part, of any dtype.
        like: a tensor that is sharded in the same way.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = like
    joined = DTensor.from_local(
        part,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=like.shape,
        stride=torch.empty(like.shape, device="meta").stride(),
    )
    full: Tensor = joined.full_tensor()
    return full


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor that is spread over ranks.

    Args:
        tensor: the part, possibly empty.
        like: a tensor that is spread in the same way: the parameter.
        owner: the owner of the layer that the tensor belongs to.
        window: the sub-tensor of the parameter that the tensor belongs to: one matrix of several; None for all of it.
    """

    tensor: Tensor
    like: Tensor
    owner: int
    window: Window | None = None

    @property
    def split(self) -> Split:
        """Which rank has which part."""
        split = split_of(self.like)
        return split if self.window is None else split.narrowed(*self.window)


class GridCommunicator:
    """Collectives along the rows and down the columns of a grid of ranks.

    To build one is itself a collective, if the grid has several rows and several columns.

    Args:
        grid: a grid of all ranks.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.rank, _ = world()
        # None stands for the group of all ranks.
        self._row = self._column = None
        if 1 < grid.workers < grid.ranks:
            self._row, _ = dist.new_subgroups_by_enumeration([grid.row(i) for i in range(grid.workers)])
            self._column, _ = dist.new_subgroups_by_enumeration([grid.column(i) for i in range(grid.columns)])

    def holds(self, owner: int) -> bool:
        """Whether this rank is in the owner's column."""
        return self.grid.column_of(owner) == self.grid.column_of(self.rank)

    def sum_to_holders(self, parcels: Sequence[Parcel]) -> None:
        """Add up every tensor over all ranks, in place. It is valid only on the ranks of its owner's column."""
        if self.grid.columns > 1:
            _run(
                [
                    (bucket, dist.reduce, {"dst": self._in_row(bucket.owner), "group": self._row})
                    for bucket in _buckets(parcels, self._in_row)
                ],
                keep=lambda bucket: self._in_row(bucket.owner) == self.rank,
            )
        if self.grid.workers > 1:
            held = [parcel for parcel in parcels if self.holds(parcel.owner)]
            _run([(bucket, dist.all_reduce, {"group": self._column}) for bucket in _buckets(held, lambda _: 0)])

    def send_to_holders(self, parcels: Sequence[Parcel]) -> None:
        """Overwrite every tensor, on the ranks of its owner's column, with the owner's tensor."""
        if self.grid.workers > 1:
            held = [parcel for parcel in parcels if self.holds(parcel.owner)]
            _run([(b, dist.broadcast, {"src": b.owner, "group": self._column}) for b in _buckets(held)])

    def send_from_holders(self, parcels: Sequence[Parcel]) -> None:
        """Overwrite every tensor, on all ranks, with the tensor of a rank of its owner's column."""
        if self.grid.columns > 1:
            _run(
                [
                    (bucket, dist.broadcast, {"src": self._in_row(bucket.owner), "group": self._row})
                    for bucket in _buckets(parcels, self._in_row)
                ]
            )

    def gather_to_holders(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """Every whole tensor, on the ranks of its owner's column; None on other ranks.

        Args:
            parts: this rank's parts, contiguous and of one dtype.
        """
        if self.grid.columns == 1 and not any(part.window for part in parts):
            return [whole(part.tensor, part.like) for part in parts]
        splits = [part.split for part in parts]
        sent: list[list[Tensor]] = [[] for _ in range(self.grid.ranks)]
        for part, split in zip(parts, splits, strict=True):
            mine = set(split.copy_of(self.rank))
            for holder in self.grid.column(self.grid.column_of(part.owner)):
                if holder in mine:
                    sent[holder].append(part.tensor.reshape(-1))
        wanted = [
            (index, sender, split.part_shape(sender))
            for index, (part, split) in enumerate(zip(parts, splits, strict=True))
            if self.holds(part.owner)
            for sender in split.copy_of(self.rank)
        ]
        arrived = _exchange(sent, [(sender, shape) for _, sender, shape in wanted], parts[0].tensor)
        found: dict[int, list[Tensor]] = {}
        for (index, _, _), chunk in zip(wanted, arrived, strict=True):
            found.setdefault(index, []).append(chunk)
        return [torch.cat(found[i], dim=splits[i].dim) if i in found else None for i in range(len(parts))]

    def scatter_from_holders(self, wholes: Sequence[Tensor | None], parts: Sequence[Part]) -> list[Tensor]:
        """This rank's part of every tensor, in new memory.

        Args:
            wholes: the whole tensors, of one dtype, on the ranks of the owner's column; None on other ranks.
            parts: how each tensor is spread, and its owner. The values of the parts do not matter.
        """
        splits = [part.split for part in parts]
        if self.grid.columns == 1:
            held = [tensor for tensor in wholes if tensor is not None]
            return [split.part(tensor, self.rank).clone() for tensor, split in zip(held, splits, strict=True)]
        sent: list[list[Tensor]] = [[] for _ in range(self.grid.ranks)]
        for tensor, split in zip(wholes, splits, strict=True):
            if tensor is not None:
                for receiver in self.grid.row(self.grid.row_of(self.rank)):
                    sent[receiver].append(split.part(tensor, receiver).reshape(-1))
        wanted = [(self._in_row(p.owner), split.part_shape(self.rank)) for p, split in zip(parts, splits, strict=True)]
        return _exchange(sent, wanted, parts[0].tensor)

    def _in_row(self, owner: int) -> int:
        """The rank of this row that is in the owner's column."""
        return self.grid.row(self.grid.row_of(self.rank))[self.grid.column_of(owner)]


def _exchange(sent: Sequence[Sequence[Tensor]], wanted: Sequence[tuple[int, torch.Size]], like: Tensor) -> list[Tensor]:
    """Send tensors from every rank to every other in one collective. Returns the received ones, ordered as `wanted`.

    Args:
        sent: vectors by receiver.
        wanted: sender and shape of each tensor that this rank receives. Tensors of one sender are in its order.
        like: a tensor with the dtype and device of all others.
    """
    sizes = [sum(vector.numel() for vector in vectors) for vectors in sent]
    arriving = [0] * len(sent)
    for sender, shape in wanted:
        arriving[sender] += shape.numel()
    outgoing = torch.cat([like.new_empty(0), *(vector for vectors in sent for vector in vectors)])
    incoming = like.new_empty(sum(arriving))
    dist.all_to_all_single(incoming, outgoing, arriving, sizes)
    offsets = list(accumulate(arriving, initial=0))
    found = []
    for sender, shape in wanted:
        found.append(incoming[offsets[sender] : offsets[sender] + shape.numel()].view(shape))
        offsets[sender] += shape.numel()
    return found


class _Bucket:
    """Parcels that are sent together, as one vector."""

    def __init__(self, parcels: list[Parcel]) -> None:
        self.parcels, self.owner = parcels, parcels[0].owner

    def pack(self) -> Tensor:
        return torch.cat([parcel.pack() for parcel in self.parcels])

    def unpack(self, packed: Tensor) -> None:
        parts = packed.split([parcel.numel for parcel in self.parcels])
        for parcel, part in zip(self.parcels, parts, strict=True):
            parcel.unpack(part)


def _buckets(parcels: Iterable[Parcel], destination: Callable[[int], int] = lambda owner: owner) -> Iterator[_Bucket]:
    """Buckets of parcels of one dtype and destination, in order. Only a single larger tensor exceeds the limit."""
    together: dict[tuple[torch.dtype, int], list[Parcel]] = {}
    for parcel in parcels:
        together.setdefault((parcel.tensor.dtype, destination(parcel.owner)), []).append(parcel)
    for (dtype, _), same in sorted(together.items(), key=lambda entry: entry[0][1]):
        filled: list[Parcel] = []
        for parcel in same:
            if filled and (sum(p.numel for p in filled) + parcel.numel) * dtype.itemsize > BUCKET_BYTES:
                yield _Bucket(filled)
                filled = []
            filled.append(parcel)
        yield _Bucket(filled)


Call = tuple[_Bucket, Callable[..., Any], dict[str, Any]]


def _run(calls: Sequence[Call], keep: Callable[[_Bucket], bool] = lambda bucket: True) -> None:
    """Run collectives and unpack their results. A few run at a time, so that those of different senders overlap."""
    started: deque[tuple[_Bucket, Tensor, Any]] = deque()

    def finish() -> None:
        bucket, packed, handle = started.popleft()
        handle.wait()
        if keep(bucket):
            bucket.unpack(packed)

    for bucket, collective, options in calls:
        if len(started) == BUCKETS_AT_A_TIME:
            finish()
        packed = bucket.pack()
        started.append((bucket, packed, collective(packed, async_op=True, **options)))
    while started:
        finish()
