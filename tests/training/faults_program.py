"""One rank of `test_faults.py`: does what its arguments name, one after the other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.helpers import arguments, in_float64, llama, optimizer_of, token_rows

import hf_so2

# Whatever the number of ranks is, a step sees these rows.
GLOBAL_BATCH = 8
STEPS = 6


def train(
    output: Path, ranks: int, callbacks: list[TrainerCallback] | None = None, *, resume: Any = None, **changes: Any
) -> hf_so2.SecondOrderTrainer:
    """Six steps in float64, saved every second step."""
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "factor_update_steps": 1,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "ddp_backend": "gloo" if ranks > 1 else None,
    }
    model = in_float64(llama(num_hidden_layers=1))
    trainer = hf_so2.SecondOrderTrainer(
        model=model, args=arguments(output, **(settings | changes)), train_dataset=token_rows(24), callbacks=callbacks
    )
    assert trainer.args.world_size == ranks
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: hf_so2.SecondOrderTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Once(TrainerCallback):
    """Calls a function with the model's MLP at the first micro-batch of the second step, on rank 1 only."""

    def __init__(self, act: Callable[[nn.Module], list[Any]]) -> None:
        self.act, self.handles = act, []

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            self.handles = self.act(model.model.layers[0].mlp.down_proj)

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        for handle in self.handles:
            handle.remove()

    on_step_end = on_substep_end


def poison(module: nn.Module) -> list[Any]:
    return [module.register_forward_hook(lambda module, inputs, output: output * torch.nan)]


def overflow(module: nn.Module) -> list[Any]:
    """Inputs whose squares are just beyond all numbers; what follows gets the output that it would have got.

    The output's own gradient is as much smaller, and not so small that its square is zero.
    """
    factors: list[float] = []

    def enlarge(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        factors.append(2e154 / float(inputs[0].abs().max()))
        return (inputs[0] * factors[-1],)

    return [
        module.register_forward_pre_hook(enlarge),
        module.register_forward_hook(lambda module, inputs, output: output / factors[-1]),
    ]


def fail(module: nn.Module) -> list[Any]:
    raise RuntimeError("rank 1 has a problem")


def state_of(trainer: hf_so2.SecondOrderTrainer) -> dict[str, Any]:
    optimizer = optimizer_of(trainer)
    return {
        "parameters": dict(trainer.model.state_dict()),
        "curvature": optimizer.curvature_state_dict(),
        "losses": losses(trainer),
    }


def resume_and_go_wrong(output: Path, ranks: int) -> dict[str, Any]:
    whole = train(output / "whole", ranks)
    torch.manual_seed(1234)  # the resumed run must not live on the state of this process
    resumed = train(output / "again", ranks, resume=str(output / "whole" / "checkpoint-2"))
    results = {"whole": state_of(whole), "resumed": state_of(resumed)}
    halved = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": GLOBAL_BATCH // ranks // 2}
    for act in (poison, overflow):
        results[act.__name__] = state_of(train(output, ranks, [Once(act)], save_strategy="no", **halved))
    return results


def raise_on_one(output: Path, ranks: int) -> None:
    train(output, ranks, [Once(fail)])


def resume(output: Path, ranks: int) -> dict[str, Any]:
    return state_of(train(output / "again", ranks, resume=str(output / "checkpoint")))


def die_in_a_save(output: Path, ranks: int) -> None:
    """Rank 1 is killed in the save of step 4, when it is about to write its share."""

    class Die(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4 and args.process_index == 1:
                hf_so2.SecondOrderTrainer._save_optimizer_and_scheduler = lambda *_: os.kill(
                    os.getpid(), signal.SIGKILL
                )

    train(output, ranks, [Die()])


def main(output: Path, *scenarios: str) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    for scenario in scenarios:
        result = globals()[scenario](output, ranks)
        torch.save(result, output / f"{scenario}-{os.environ['RANK']}.pt")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
