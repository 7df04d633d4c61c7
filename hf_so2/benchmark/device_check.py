"""Training on a device beside training on a CPU in float64, and how often a step makes the host wait for the device."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2.benchmark.contestants import autocast, seeded_llama, with_rates

STEPS, INTERVAL = 6, 2
VOCABULARY, SHAPE = 128, (4, 32)
RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Args:
        dtype: of the weights.
        autocast: of the products, or None.
        scaled: by a `GradScaler`.
        compiled: on the device, by `torch.compile`.
    """

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scaled: bool = False
    compiled: bool = False


REFERENCE = Setting(torch.float64)
SETTINGS = {
    "float32": Setting(),
    "compiled": Setting(compiled=True),
    "bf16 autocast": Setting(autocast=torch.bfloat16),
    "bf16 weights": Setting(torch.bfloat16),
    "fp16, GradScaler": Setting(autocast=torch.float16, scaled=True),
}
CPU = torch.device("cpu")


def learned(name: str, setting: Setting, device: torch.device) -> dict[str, Tensor]:
    """What every weight changes by in `STEPS` steps, float64 on the CPU."""
    model = _model().to(device, setting.dtype)
    before = {key: value.detach().double().cpu().clone() for key, value in model.named_parameters()}
    optimizer = with_rates(name, model, RATE, INTERVAL)
    called: Any = torch.compile(model) if setting.compiled else model
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=setting.scaled)
    for batch in _batches():
        with autocast(device, setting.autocast):
            loss = called(input_ids=batch.to(device), labels=batch.to(device)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {key: value.detach().double().cpu() - before[key] for key, value in model.named_parameters()}


def waits_of(name: str, device: torch.device) -> dict[str, dict[str, int]]:
    """How often `backward`, `step` with and `step` without a refresh wait for the device, by the place that waits."""
    model = _model().to(device)
    optimizer = with_rates(name, model, RATE, INTERVAL)
    found: dict[str, dict[str, int]] = {}
    for number, batch in enumerate(_batches(), start=1):
        tokens = batch.to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        with waiting(device) as places:
            loss.backward()
        found["backward"] = dict(places)
        with waiting(device) as places:
            optimizer.step()
        # Refreshes are spread over the steps of an interval, so that one step alone shows only some of them.
        found["the first step" if number == 1 else "a later step"] = dict(places)
        optimizer.zero_grad()
    return found


@contextmanager
def waiting(device: torch.device) -> Iterator[Counter[str]]:
    """Counts the operations that make the host wait for a GPU, by our innermost line; none on a CPU."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        yield places
        return

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        ours = [f for f in traceback.extract_stack() if "hf_so2" in f.filename and f.name != "note"]
        places[f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "torch"] += 1

    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _model() -> nn.Module:
    return seeded_llama(
        0,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SHAPE[1],
    )


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, SHAPE, generator=generator) for _ in range(STEPS)]


def distance(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """‖Δw - Δw_ref‖ / ‖Δw_ref‖ over all weights."""
    apart = torch.stack([(found[key] - value).norm() for key, value in reference.items()]).norm()
    return float(apart / torch.stack([value.norm() for value in reference.values()]).norm())
