"""All collectives of the package. In a single process each of them does nothing.

Every rank has to call the same ones in the same order, with tensors of the same shapes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_so2.distributed.assignment import Grid
from hf_so2.distributed.packing import Parcel

T = TypeVar("T")

# A bucket is a copy of what it holds: large ones save nothing any more and cost memory, as do many at a time.
BUCKET_BYTES = 64 * 2**20
BUCKETS_AT_A_TIME = 8


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor, as under FSDP2 and tensor parallelism."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # not there in a torch that was built without torch.distributed

    return isinstance(tensor, DTensor)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up every tensor over all ranks, in place."""
    if world()[1] > 1:
        _run([(bucket, dist.all_reduce, {}) for bucket in _buckets(map(Parcel, tensors))])


def send_from_owners(parcels: Sequence[Parcel]) -> None:
    """Overwrite every tensor, on all ranks, with its owner's."""
    if world()[1] > 1:
        _run([(bucket, dist.broadcast, {"src": bucket.owner}) for bucket in _buckets(parcels)])


def gather_objects(mine: T) -> list[T]:
    """What every rank passed, in the order of ranks; pickled, so for small things."""
    if world()[1] == 1:
        return [mine]
    found: list[Any] = [None] * world()[1]
    dist.all_gather_object(found, mine)
    return found


class GridCommunicator:
    """Collectives along the rows and down the columns of a grid of ranks.

    Building one is a collective itself where the grid has several rows and several columns.

    Args:
        grid: of as many ranks as there are.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.rank, _ = world()
        # No group stands for all ranks.
        self._row = self._column = None
        if 1 < grid.workers < grid.ranks:
            self._row, _ = dist.new_subgroups_by_enumeration([grid.row(i) for i in range(grid.workers)])
            self._column, _ = dist.new_subgroups_by_enumeration([grid.column(i) for i in range(grid.columns)])

    def holds(self, owner: int) -> bool:
        """Whether this rank is in the owner's column."""
        return self.grid.column_of(owner) == self.grid.column_of(self.rank)

    def sum_to_holders(self, parcels: Sequence[Parcel]) -> None:
        """Add up every tensor over all ranks, in place on the ranks of its owner's column; elsewhere it is spoilt."""
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
        """Overwrite every tensor, on the ranks of its owner's column, with the owner's."""
        if self.grid.workers > 1:
            held = [parcel for parcel in parcels if self.holds(parcel.owner)]
            _run([(b, dist.broadcast, {"src": b.owner, "group": self._column}) for b in _buckets(held)])

    def send_from_holders(self, parcels: Sequence[Parcel]) -> None:
        """Overwrite every tensor, on all ranks, with that of a rank of its owner's column."""
        if self.grid.columns > 1:
            _run(
                [
                    (bucket, dist.broadcast, {"src": self._in_row(bucket.owner), "group": self._row})
                    for bucket in _buckets(parcels, self._in_row)
                ]
            )

    def _in_row(self, owner: int) -> int:
        """The rank of this row that is in the owner's column."""
        return self.grid.row(self.grid.row_of(self.rank))[self.grid.column_of(owner)]


class _Bucket:
    """Parcels that travel together, joined end to end."""

    def __init__(self, parcels: list[Parcel]) -> None:
        self.parcels, self.owner = parcels, parcels[0].owner

    def pack(self) -> Tensor:
        return torch.cat([parcel.pack() for parcel in self.parcels])

    def unpack(self, packed: Tensor) -> None:
        parts = packed.split([parcel.numel for parcel in self.parcels])
        for parcel, part in zip(self.parcels, parts, strict=True):
            parcel.unpack(part)


def _buckets(parcels: Iterable[Parcel], destination: Callable[[int], int] = lambda owner: owner) -> Iterator[_Bucket]:
    """Parcels of one dtype that go the same way, in their order; no bucket exceeds the limit unless by one tensor."""
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
    """Run collectives, a few at a time so that those of different senders overlap, and unpack what each leaves."""
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
