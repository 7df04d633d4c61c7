"""TRL's trainers on tiny data: a tokenizer of words, data sets, arguments and the micro-batches that were seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import hf_so2

WORDS = ["[PAD]", "[EOS]", *(f"w{number}" for number in range(30))]
BATCH = 4


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [" ".join(f"w{n}" for n in torch.randint(30, (size,), generator=generator).tolist()) for size in lengths]


def completions(count: int = 32) -> datasets.Dataset:
    prompts, answers = sentences(count, 0), sentences(count, 1)
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": [f" {answer}" for answer in answers]})


def preferences(count: int = 32) -> datasets.Dataset:
    names = {"prompt": 0, "chosen": 1, "rejected": 2}
    return datasets.Dataset.from_dict({name: sentences(count, seed) for name, seed in names.items()})


def arguments(config: type, folder: Path, **changes: Any) -> Any:
    fields = {
        "output_dir": str(folder),
        "optim": "kfac",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": BATCH,
        "max_steps": 4,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "max_length": 24,
    }
    return hf_so2.second_order_arguments(config)(**(fields | changes))


class Batches:
    """Keeps the micro-batches that a trainer differentiates."""

    def __init__(self, trainer: Any) -> None:
        self.inputs: list[dict[str, torch.Tensor]] = []
        step = trainer.training_step

        def recording(model: Any, inputs: Any, *rest: Any) -> Any:
            self.inputs.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
            return step(model, inputs, *rest)

        trainer.training_step = recording


def per_row(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
