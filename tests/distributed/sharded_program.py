"""One rank of `test_sharded.py`: trains every case under FSDP2 and saves where each ended."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import parameters, sharded_cases, train


def main(output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))

    def shard(model: nn.Module) -> None:
        blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)

    ends = {}
    for case in sharded_cases(all_of_them=ranks > 2):
        model, _ = train(case, rank, ranks, shard=shard)
        ends[str(case)] = parameters(model)
    torch.save({"ends": ends}, output / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
