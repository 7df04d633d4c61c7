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
from hf_so2.distributed.shards import is_sharded, split_of

T = TypeVar("T")

# A bucket is a copy of what it holds: large ones save nothing any more and cost memory, as do many at a time.
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
    """Overwrite every tensor, on all ranks, with its owner's."""
    if world()[1] > 1:
        _run([(bucket, dist.broadcast, {"src": bucket.owner}) for bucket in _buckets(parcels)])


def true_on_all_ranks(flag: Tensor) -> bool:
    """Whether a flag, 0-dim, is up on every rank."""
    down = flag.logical_not().to(torch.int64)
    sum_over_ranks([down])
    return not bool(down)


def gather_objects(mine: T) -> list[T]:
    """What every rank passed, in the order of ranks; pickled, so for small things."""
    if world()[1] == 1:
        return [mine]
    found: list[Any] = [None] * world()[1]
    dist.all_gather_object(found, mine)
    return found


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole, on every rank, of a tensor that is spread as another one is; where that is sharded, a collective.

    Args:
        part: this rank's, of any dtype.
        like: spread the same way.
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
    """What this rank has of a tensor that is spread over ranks.

    Args:
        tensor: its part, possibly empty.
        like: a tensor that is spread the same way: the parameter.
        owner: of the layer that it belongs to.
    """

    tensor: Tensor
    like: Tensor
    owner: int


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

    def gather_to_holders(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """The whole of every tensor on the ranks of its owner's column; None elsewhere.

        Args:
            parts: this rank's, contiguous and of one dtype.
        """
        if self.grid.columns == 1:
            return [whole(part.tensor, part.like) for part in parts]
        splits = [split_of(part.like) for part in parts]
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
        """This rank's part of every tensor, in memory of its own.

        Args:
            wholes: of one dtype, on the ranks of the owner's column; None elsewhere.
            parts: how each is spread, and whose it is; their values do not matter.
        """
        splits = [split_of(part.like) for part in parts]
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
    """Send tensors from every rank to every other at once; what arrives, in the order of `wanted`.

    Args:
        sent: vectors by receiver.
        wanted: sender and shape of what this rank gets, what comes from one sender in that one's order.
        like: of the dtype and on the device of all.
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
