"""Trainer callbacks."""

from __future__ import annotations

import math
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, has_length

from hf_so2.optim import SecondOrderOptimizer

TELEMETRY_PREFIX = "curvature/"  # of all that `SecondOrderOptimizer.telemetry` returns


class DiscardStaleCaptures(TrainerCallback):
    """Start every step with empty sums.

    A step can end without `optimizer.step()`: a loss scaler skips it after an overflow, `auto_find_batch_size` starts
    over, training is interrupted and `train()` called again. What was captured for it must not enter the next step.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = second_order_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            optimizer.discard_captures()


class ObserveLoggedSteps(TrainerCallback):
    """Have the optimizer record for `telemetry` the steps after which the Trainer logs, and no others."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = second_order_optimizer(kwargs.get("optimizer"))
        if optimizer is not None and _is_logged(state.global_step + 1, args, state, kwargs.get("train_dataloader")):
            optimizer.observe_next_step()


class QuietProgress(ProgressCallback):
    """transformers' progress bar without curvature, which goes to the trackers and `trainer_state.json`."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        super().on_log(args, state, control, logs=_without_curvature(logs), **kwargs)


class QuietPrinter(PrinterCallback):
    """transformers' printed lines, likewise."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        super().on_log(args, state, control, logs=_without_curvature(logs), **kwargs)


def keep_curvature_off_the_console(callbacks: list[TrainerCallback]) -> None:
    """Have those of transformers' callbacks that write to the console leave out what is for trackers.

    In place, so that their order and what they have counted stay; subclasses of them are left as somebody made them.
    """
    for callback in callbacks:
        if type(callback) is ProgressCallback:
            callback.__class__ = QuietProgress
        elif type(callback) is PrinterCallback:
            callback.__class__ = QuietPrinter


def _without_curvature(logs: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if not name.startswith(TELEMETRY_PREFIX)}


def _is_logged(step: int, args: TrainingArguments, state: TrainerState, batches: Any) -> bool:
    """Whether the Trainer will log after this step, as its own `DefaultFlowCallback` decides once it is made."""
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy == IntervalStrategy.EPOCH and has_length(batches):
        return step % math.ceil(len(batches) / args.gradient_accumulation_steps) == 0
    return False


def second_order_optimizer(optimizer: Any) -> SecondOrderOptimizer | None:
    """Ours, out of accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, SecondOrderOptimizer) else None
