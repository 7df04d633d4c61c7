"""A long run with evaluation, saving, resuming and faults mixed in: what a process holds must not grow.

`SOAK_STEPS` says how long: 20,000 unless told otherwise, about ten minutes.
"""

from __future__ import annotations

import collections
import gc
import math
import os
import random
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, llama, optimizer_of, token_rows
from torch import nn
from transformers import TrainerCallback

import hf_so2

sys.path.insert(0, str(Path(__file__).parent))
from plain_loop import Fault
from trainer_acts import FAULTS, module_of

STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
EVERY = 100  # steps between saves and between evaluations
SHARE_OF_FAULTS, SHARE_OF_STOPS = 0.01, 0.002  # of steps
GOES_ON = ("gradient", "loss", "idle", "lapack")


class Mixed(TrainerCallback):
    """Draws faults, and measures at every save."""

    def __init__(self, output: Path) -> None:
        self.output, self.chance, self.handles = output, random.Random(0), []
        self.samples: dict[str, list[float]] = collections.defaultdict(list)
        self.faults: collections.Counter[str] = collections.Counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.remove()
        drawn = self.chance.random()
        if drawn < SHARE_OF_STOPS:
            error = self.chance.choice([Fault, KeyboardInterrupt])
            self.faults[error.__name__] += 1
            self.handles = [module_of(model, self.chance.random()).register_forward_hook(raising(error))]
        elif drawn < SHARE_OF_FAULTS:
            kind = self.chance.choice(GOES_ON)
            self.faults[kind] += 1
            self.handles = FAULTS[kind][0](self.chance)(model)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        files = [path for path in self.output.rglob("*") if path.is_file()]
        # The Trainer's own log has an entry more for every evaluation.
        sizes = [path.stat().st_size for path in files if path.name not in ("trainer_state.json", "manifest.json")]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.samples["memory in MB"].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.samples["handles"].append(len(os.listdir("/proc/self/fd")))
        self.samples["threads"].append(len(os.listdir("/proc/self/task")))
        self.samples["threads of Python"].append(threading.active_count())
        self.samples["tensors"].append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        self.samples["files"].append(len(files))
        self.samples["disk in kB"].append(sum(sizes) / 1024)


def raising(error: type[BaseException]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error("made to fail")

    return hook


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="what a process holds is read there")
def test_soak(tmp_path: Path) -> None:
    rows, mixed, resumed = token_rows(64), Mixed(tmp_path), 0
    settings = {
        "optim": "kfac_mup",
        "mup_base_width": 16,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_strategy": "steps",
        "save_steps": EVERY,
        "save_total_limit": 2,
    }
    while True:
        trainer = hf_so2.SecondOrderTrainer(
            model=llama(32, num_hidden_layers=1),
            args=arguments(tmp_path, **settings),
            train_dataset=rows,
            eval_dataset=rows[:16],
            callbacks=[mixed],
        )
        try:
            trainer.train(resume_from_checkpoint=resumed > 0 and any(tmp_path.glob("checkpoint-*")))
            break
        except (Fault, KeyboardInterrupt):
            mixed.remove()
            resumed += 1
    assert trainer.state.global_step == STEPS
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    left_out = optimizer_of(trainer).skipped_steps
    print(f"\n{STEPS} steps, {resumed} times resumed, {left_out} steps left out on the way that was kept")
    print(dict(mixed.faults))
    _require_no_growth(mixed.samples)


def _require_no_growth(samples: dict[str, list[float]]) -> None:
    """Between the second quarter of the run and the last: in the first, allocators and caches fill."""
    for name, values in samples.items():
        quarter = len(values) // 4
        early, late = values[quarter : 2 * quarter], values[-quarter:]
        before, after = statistics.median(early), statistics.median(late)
        print(f"{name}: {before:.1f} in the second quarter, {after:.1f} in the last; at most {max(values):.1f}")
        # Allocators round; all else is counted.
        assert after <= before * (1.03 if name in ("memory in MB", "disk in kB") else 1.0), name


def test_growth_is_seen() -> None:
    """The judge of the soak, with a handle more at every save."""
    _require_no_growth({"handles": [20.0] * 8})
    with pytest.raises(AssertionError, match="handles"):
        _require_no_growth({"handles": [20.0 + index for index in range(8)]})
