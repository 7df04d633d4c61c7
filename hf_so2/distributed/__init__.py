"""Work shared between processes: who holds and refreshes what, and every collective of the package."""

from hf_so2.distributed.assignment import Cost, Grid, assign, place
from hf_so2.distributed.communicator import (
    GridCommunicator,
    gather_objects,
    is_sharded,
    send_from_owners,
    sum_over_ranks,
    world,
)
from hf_so2.distributed.packing import Parcel

__all__ = [
    "Cost",
    "Grid",
    "GridCommunicator",
    "Parcel",
    "assign",
    "gather_objects",
    "is_sharded",
    "place",
    "send_from_owners",
    "sum_over_ranks",
    "world",
]
