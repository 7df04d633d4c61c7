"""What is run by `ten_settings.py`, and one run of it: settings which differ in one thing each from a small Llama."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler, set_seed

from hf_so2 import build_optimizer
from hf_so2.data import DataArguments
from hf_so2.data.corpora import load_documents, split_documents
from hf_so2.data.packing import pack_documents
from hf_so2.data.tokenizer import corpus_tokenizer
from hf_so2.errors import TrainingDivergedError

WARMUP, CLIP, EVALUATED, FIRST, HEADERS = 0.1, 1.0, 32_768, 10, 3_000_000
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MIXTRAL = LLAMA | {"model_type": "mixtral", "intermediate_size": 88, "num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Setting:
    """One row of the table; what is left out is the reference.

    Args:
        config: of the model.
        vocabulary: entries of the tokenizer, which is trained on the corpus that training began with.
        sequence: tokens of a sequence.
        tokens: of a step.
        steps: how many.
        corpus: `python`, the standard library's sources, or `c++`, the headers that torch comes with.
        pretrained: steps of training on `python` beforehand, at the defaults.
        lora: whether adapters of rank 8 are all that is trained.
        settings: of the optimizer, beside the two rates.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: LLAMA)
    vocabulary: int = 2048
    sequence: int = 128
    tokens: int = 1024
    steps: int = 100
    corpus: str = "python"
    pretrained: int = 0
    lora: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


SETTINGS = {
    "reference": Setting(),
    "GPT-2, tied": Setting(GPT2),
    "GPT-2, not tied": Setting(GPT2 | {"tie_word_embeddings": False}),
    "Llama, tied": Setting(LLAMA | {"tie_word_embeddings": True}),
    "GPT-2, tied, 400 steps": Setting(GPT2, steps=400),
    "fine-tuning": Setting(corpus="c++", pretrained=400),
    "LoRA": Setting(corpus="c++", pretrained=400, lora=True),
    "vocabulary 512": Setting(vocabulary=512),
    "50 steps": Setting(steps=50),
    "256 tokens a step": Setting(tokens=256),
    "sequence 64": Setting(sequence=64),
    "sequence 1,024": Setting(sequence=1024),
    "C++": Setting(corpus="c++"),
    "MoE": Setting(MIXTRAL),
    "12 layers": Setting(LLAMA | {"num_hidden_layers": 12}),
    "800 steps": Setting(steps=800),
    "8,192 tokens a step": Setting(tokens=8192),
    "vocabulary 16,384": Setting(vocabulary=16_384),
}

# Tried once, when the defaults were settled.
UNSEEN = {
    "Qwen3, tied, vocabulary 4,096": Setting(
        LLAMA | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}, vocabulary=4096
    ),
    "GPT-NeoX, 200 steps, C++": Setting(
        LLAMA | {"model_type": "gpt_neox", "intermediate_size": 256}, steps=200, corpus="c++"
    ),
    "Gemma, 4 layers, 512 tokens a step": Setting(
        LLAMA | {"model_type": "gemma", "head_dim": 32, "num_hidden_layers": 4, "tie_word_embeddings": True}, tokens=512
    ),
}
# What came of the third asks for this one.
GEMMA = "Gemma, 4 layers, 512 tokens a step"
UNSEEN[f"{GEMMA}, 400 steps"] = replace(UNSEEN[GEMMA], steps=400)
ALL = SETTINGS | UNSEEN


@dataclass(frozen=True)
class Run:
    """One run: factors on the defaults of `lr` and of `fallback_learning_rate`, and what else is changed for all.

    Args:
        setting: a key of `ALL`.
        variant: a name for `changes`, in the results.
    """

    setting: str
    rate: float = 1.0
    fallback: float = 1.0
    seed: int = 0
    variant: str = "defaults"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.setting, self.rate, self.fallback, self.seed, self.variant


def documents(corpus: str) -> tuple[Dataset, Dataset]:
    if corpus == "python":
        return load_documents(DataArguments())
    root, texts, size = Path(torch.__file__).parent / "include" / "torch", [], 0
    for path in sorted(root.rglob("*.h")):
        if size < HEADERS:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1])
    return split_documents(Dataset.from_dict({"text": texts}), DataArguments())


@functools.cache
def blocks(corpus: str, vocabulary: int, sequence: int, began_with: str) -> tuple[int, Tensor, Tensor]:
    """Entries of the vocabulary, and blocks to train and to be judged on: `(n, sequence)` ids."""
    tokenizer = corpus_tokenizer(documents(began_with)[0], vocabulary)
    parts = [
        torch.from_numpy(np.asarray(pack_documents(part, tokenizer, sequence).with_format("numpy")["input_ids"][:]))
        for part in documents(corpus)
    ]
    return len(tokenizer), parts[0], parts[1][: EVALUATED // sequence]


def _data(setting: Setting) -> tuple[int, Tensor, Tensor]:
    began_with = "python" if setting.pretrained else setting.corpus
    return blocks(setting.corpus, setting.vocabulary, setting.sequence, began_with)


def _model(setting: Setting, seed: int, folder: Path) -> tuple[Any, Any, str]:
    """The model, the config of its base width (None with adapters) and the optimizer's name."""
    size = _data(setting)[0]
    config = AutoConfig.for_model(**setting.config, vocab_size=size, bos_token_id=None, eos_token_id=None)
    if not setting.pretrained:
        set_seed(seed)
        return AutoModelForCausalLM.from_config(config), config, "kfac_mup"
    name = "-".join(str(part) for part in (config.model_type, size, setting.sequence, setting.pretrained))
    path = folder / f"{name}.pt"
    if not path.exists():
        beforehand = Setting(setting.config, setting.vocabulary, setting.sequence, steps=setting.pretrained)
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        _train(model, build_optimizer("kfac_mup", model, base_config=config), beforehand, seed=0)
        torch.save(model.state_dict(), path)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(torch.load(path))
    if not setting.lora:
        return model, config, "kfac_mup"
    from peft import LoraConfig, get_peft_model

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linear)), None, "kfac"


def _train(model: Any, optimizer: Any, setting: Setting, *, seed: int, first: int | None = None) -> list[float]:
    """Trains as the Trainer does, or for `first` steps without warm-up and clip; every step's loss, on its own batch.

    Ends early where a loss is no number or above 30.
    """
    batch = setting.tokens // setting.sequence
    train = _data(setting)[1]
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(setting.steps * batch / len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(rounds)])
    schedule = None if first else get_scheduler("cosine", optimizer, math.ceil(WARMUP * setting.steps), setting.steps)
    losses: list[float] = []
    model.train()
    for step in range(first or setting.steps):
        ids = train[order[step * batch : (step + 1) * batch]].long()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        if not losses[-1] < 30:
            break
        loss.backward()
        if schedule:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        try:
            optimizer.step()
        except TrainingDivergedError:
            losses.append(math.inf)
            break
        if schedule:
            schedule.step()
        optimizer.zero_grad()
    return losses


def train(run: Run, changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The loss on held-out text after training; infinite where it diverged."""
    setting = ALL[run.setting]
    model, base, name = _model(setting, run.seed, folder)
    settings = {**setting.settings, **changes}
    defaults = build_optimizer(name, model, base_config=base, **settings).settings
    settings["lr"] = run.rate * defaults.lr
    settings["fallback_learning_rate"] = run.fallback * defaults.fallback_learning_rate
    optimizer = build_optimizer(name, model, base_config=base, **settings)
    losses = _train(model, optimizer, setting, seed=run.seed)
    ended = len(losses) == setting.steps and math.isfinite(losses[-1])
    loss = evaluate(model, setting) if ended else math.inf
    return {"loss": loss, "highest": max(losses), "first": losses[0], "skipped": optimizer.skipped_steps}


def first_steps(name: str, changes: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Losses of a plain loop without warm-up or clip: the first, and the highest of the first steps after it."""
    setting = ALL[name]
    result = {}
    for optimizer_name in ("own", "adamw"):
        model, base, own = _model(setting, 0, folder)
        own_optimizer = build_optimizer(own, model, base_config=base, **setting.settings, **changes)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        optimizer = own_optimizer if optimizer_name == "own" else adamw
        losses = _train(model, optimizer, setting, seed=0, first=FIRST + 1)
        result |= {"start": losses[0], optimizer_name: max(losses[1:])}
    return result


@torch.no_grad()
def evaluate(model: Any, setting: Setting) -> float:
    model.eval()
    parts = _data(setting)[2].long().split(max(1, 4096 // setting.sequence))
    losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in parts]
    return sum(losses) / sum(len(ids) for ids in parts)
