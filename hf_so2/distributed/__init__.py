"""Work shared between processes; every collective of the package is in `communicator`."""

from hf_so2.distributed.communicator import sum_over_ranks

__all__ = ["sum_over_ranks"]
