"""Work shared between processes: which rank holds and refreshes which layer, and every collective of the package."""

from hf_so2.distributed.assignment import Cost, Grid, assign, place
from hf_so2.distributed.communicator import (
    BUCKET_BYTES,
    GridCommunicator,
    Part,
    gather_objects,
    send_from_owners,
    sum_over_ranks,
    true_on_all_ranks,
    whole,
    world,
)
from hf_so2.distributed.packing import Parcel
from hf_so2.distributed.shards import Split, is_offloading, is_sharded, local, refuse_other_sharding, split_of

__all__ = [
    "BUCKET_BYTES",
    "Cost",
    "Grid",
    "GridCommunicator",
    "Parcel",
    "Part",
    "Split",
    "assign",
    "gather_objects",
    "is_offloading",
    "is_sharded",
    "local",
    "place",
    "refuse_other_sharding",
    "send_from_owners",
    "split_of",
    "sum_over_ranks",
    "true_on_all_ranks",
    "whole",
    "world",
]
