"""One rank of `test_two_ranks.py`: trains, checks that it is one of two, and saves what it ended with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.helpers import captured_factors, llama, optimizer_of, token_rows, trained

from hf_so2 import SecondOrderTrainer


def on_half_of_each_batch(output: Path, **changes: Any) -> SecondOrderTrainer:
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    return trained(llama(), token_rows(padded=True), output, damping=1e-2, **split, **changes)


def main(output: Path) -> None:
    torch.set_num_threads(1)
    trainer = on_half_of_each_batch(output)
    assert trainer.args.world_size == torch.distributed.get_world_size() == 2
    optimizer = optimizer_of(trainer)
    result = {"parameters": dict(trainer.model.state_dict()), "factors": captured_factors(optimizer)}
    spread = on_half_of_each_batch(
        output, gradient_worker_fraction=0.0, save_strategy="steps", save_steps=2, logging_strategy="steps"
    )
    layers = optimizer_of(spread).curvature.layers.values()
    result["spread"] = dict(spread.model.state_dict())
    result["held"] = [layer.name for layer in layers if layer.held]
    torch.save(result, output / f"rank-{trainer.args.process_index}.pt")
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
