"""Work shared between processes: who refreshes what, and every collective of the package."""

from hf_so2.distributed.assignment import assign
from hf_so2.distributed.communicator import send_from_owners, sum_over_ranks, world

__all__ = ["assign", "send_from_owners", "sum_over_ranks", "world"]
