"""One rank of `test_sharded_resume.py`: trains under FSDP2 from the start or from a checkpoint, however many ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import sharded_trainer
from shared.sharded_trainer import SCENARIOS


def main(output: Path, resume: Path | None) -> None:
    """One folder per scenario; checkpoints are the same under `output` and under `resume`."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    results = {}
    for name, changes in SCENARIOS.items():
        checkpoint = None if resume is None else str(resume.parent / name / resume.name)
        trainer = sharded_trainer.train(output / name, ranks, resume=checkpoint, save_steps=2, **changes)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[name] = {"losses": losses, "parameters": sharded_trainer.wholes(trainer)}
    torch.save(results, output / f"rank-{os.environ['RANK']}-of-{torch.distributed.get_world_size()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
