"""One rank of `test_every_name.py`: trains every case on its share and saves where each ended."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.ranks import INTERRUPTED, STEPS, cases, parameters, train


def main(output: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    assert ranks == torch.distributed.get_world_size()
    wrap = accelerator.prepare_model
    ends = {str(case): parameters(train(case, rank, ranks, wrap=wrap)[0]) for case in cases(all_of_them=ranks > 2)}

    # As transformers' Trainer wraps models. Otherwise DDP arranges its buckets anew after a first step and, where ranks
    # are more than two, sums in another order, so that no optimizer goes on bit for bit.
    wrap = partial(DistributedDataParallel, find_unused_parameters=True)
    straight = parameters(train(INTERRUPTED, rank, ranks, wrap=wrap)[0])
    model, optimizer = train(INTERRUPTED, rank, ranks, wrap=wrap, steps=range(STEPS // 2))
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, output / f"checkpoint-{rank}.pt")
    checkpoint = torch.load(output / f"checkpoint-{rank}.pt", weights_only=True)
    model, optimizer = train(INTERRUPTED, rank, ranks, wrap=wrap, steps=range(STEPS // 2, STEPS), resume=checkpoint)
    result = {
        "ends": ends,
        "straight": straight,
        "resumed": parameters(model),
        "telemetry": optimizer.telemetry("layer"),
    }
    torch.save(result, output / f"rank-{rank}.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
