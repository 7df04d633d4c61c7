"""Losses of the first steps of a loop without warm-up, schedule or clip, by how long the fallback's rate is limited.

    python docs/measurements/settings/first_steps.py

K-FAC at its defaults but for `fallback_warmup_steps`, and AdamW at 0.001. One line per model, text and limit.
"""

from __future__ import annotations

from typing import Any

import torch
from settings_runs import GPT2, LLAMA, blocks
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_so2 import build_optimizer

STEPS, BATCH, SEQUENCE, VOCABULARY = 14, 8, 128, 2048
LIMITS: tuple[int | None, ...] = (None, 1, 10, 20, 40)  # None is AdamW
WIDE = GPT2 | {"n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 128}
NARROW = WIDE | {"n_embd": 128, "n_head": 2}


def losses(config: Any, base: Any, batches: Tensor, limit: int | None) -> list[float]:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    if limit is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = build_optimizer("kfac_mup", model, base_config=base, fallback_warmup_steps=limit)
    told = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        told.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return told


def configs(vocabulary: int, *settings: dict[str, Any]) -> list[Any]:
    ids = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    return [AutoConfig.for_model(**setting, **ids) for setting in settings]


def main() -> None:
    torch.set_num_threads(1)
    size, train, _ = blocks("python", VOCABULARY, SEQUENCE, "python")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH]
    text = train[order].view(STEPS, BATCH, SEQUENCE).long()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(size, (STEPS, BATCH, SEQUENCE), generator=generator)
    rare = torch.randint(20_000, (STEPS // 2, 2, SEQUENCE // 2), generator=torch.Generator().manual_seed(0))
    gpt2, llama, tied = configs(size, GPT2, LLAMA, LLAMA | {"tie_word_embeddings": True})
    wide, narrow = configs(20_000, WIDE, NARROW)
    cases = {
        "GPT-2, text": (gpt2, gpt2, text),
        "tied Llama, text": (tied, tied, text),
        "GPT-2, random tokens": (gpt2, gpt2, noise),
        "Llama, random tokens": (llama, llama, noise),
        "GPT-2 of width 512, base 128, 20,000 tokens, random": (wide, narrow, rare),
    }
    for name, case in cases.items():
        for limit in LIMITS:
            kind = "AdamW 0.001" if limit is None else f"K-FAC, limit {limit}"
            print(f"{name:52s} {kind:16s}", *(f"{loss:.2f}" for loss in losses(*case, limit)), flush=True)


if __name__ == "__main__":
    main()
