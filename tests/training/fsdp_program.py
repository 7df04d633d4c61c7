"""scripts/train.py where accelerate does not drop FSDP: as its launcher has set it up, on ranks without GPUs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.sharded_trainer import keep_fsdp

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
create_accelerator = Trainer.create_accelerator_and_postprocess


def create_accelerator_with_fsdp(self: Trainer) -> None:
    create_accelerator(self)
    keep_fsdp(self, FullyShardedDataParallelPlugin())  # out of the environment


if __name__ == "__main__":
    Trainer.create_accelerator_and_postprocess = create_accelerator_with_fsdp
    runpy.run_path(str(SCRIPT), run_name="__main__")
