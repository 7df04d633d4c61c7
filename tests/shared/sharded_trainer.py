"""Runs of the Trainer under FSDP2, on ranks without GPUs, and in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from shared.helpers import BOTH_ENDS, arguments, in_float64, llama, token_rows
from torch.distributed.tensor import DTensor
from transformers import Trainer

import hf_so2

GLOBAL_BATCH = 8
STEPS = 10
SCENARIOS: dict[str, dict[str, Any]] = {
    "tied, saved whole": {"tied": True, "gradient_worker_fraction": 0.0, **BOTH_ENDS},
    "saved as shards": {"optim": "shampoo", "state_dict_type": "SHARDED_STATE_DICT"},
    "mup": {"optim": "kfac_mup", "mup_base_config": llama(16, num_hidden_layers=1).config.to_dict(), "width": 32},
}
"""The first of them in the default suite."""


def _distributed_type(state: AcceleratorState) -> DistributedType:
    return DistributedType.FSDP if "fsdp_plugin" in vars(state) else vars(state)["distributed_type"]


# The state takes its own from the processes' every time that somebody asks for it.
AcceleratorState.distributed_type = property(
    _distributed_type, lambda state, value: vars(state).update(distributed_type=value)
)


def keep_fsdp(trainer: Trainer, plugin: FullyShardedDataParallelPlugin) -> None:
    """Accelerate drops FSDP on a machine without GPUs, without a word."""
    trainer.accelerator.state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True


class OnCPU(hf_so2.SecondOrderTrainer):
    """Under FSDP2 wherever there are several ranks."""

    state_dict_type: str

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if torch.distributed.is_initialized():
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                state_dict_type=self.state_dict_type,
            )
            keep_fsdp(self, plugin)


def train(
    output: Path,
    ranks: int,
    *,
    width: int = 16,
    tied: bool = False,
    state_dict_type: str = "FULL_STATE_DICT",
    resume: Any = None,
    **changes: Any,
) -> hf_so2.SecondOrderTrainer:
    """Ten steps in float64 of two micro-batches, saved after the eighth."""
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // ranks // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "preconditioner_update_steps": 3,
        "save_strategy": "steps",
        "save_steps": 8,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "ddp_backend": "gloo" if ranks > 1 else None,
    }
    sizes = {"vocab_size": 97, "intermediate_size": 97, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    model = in_float64(llama(width, **sizes))
    rows = token_rows(GLOBAL_BATCH * STEPS, padded=True)
    OnCPU.state_dict_type = state_dict_type
    trainer = OnCPU(model=model, args=arguments(output, **(settings | changes)), train_dataset=rows)
    assert trainer.args.world_size == ranks
    trainer.train(resume_from_checkpoint=resume)
    assert ranks == 1 or all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return trainer


def wholes(trainer: hf_so2.SecondOrderTrainer) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }


def losses_and_curvature(trainer: hf_so2.SecondOrderTrainer) -> list[dict[str, float]]:
    """What was logged of every step, but for times."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if "seconds" not in key} for entry in steps]
