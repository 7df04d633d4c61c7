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

TELEMETRY_PREFIX = "curvature/"  # of all keys of `SecondOrderOptimizer.telemetry`


class DiscardStaleCaptures(TrainerCallback):
    """Starts every step with empty sums.

    A step can end without `optimizer.step()`: a loss scaler skips it after an overflow, `auto_find_batch_size` starts
    again, or training is interrupted and `train()` is called again. The captures of this step must not enter the next
    one.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = second_order_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            optimizer.discard_captures()


class ObserveLoggedSteps(TrainerCallback):
    """Lets the optimizer record values for `telemetry` at the steps after which the Trainer logs, and at no others."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = second_order_optimizer(kwargs.get("optimizer"))
        if optimizer is not None and _is_logged(state.global_step + 1, args, state, kwargs.get("train_dataloader")):
            optimizer.observe_next_step()


class QuietProgress(ProgressCallback):
    """transformers' progress bar, without curvature. The curvature goes to the trackers and `trainer_state.json`."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        super().on_log(args, state, control, logs=_without_curvature(logs), **kwargs)


class QuietPrinter(PrinterCallback):
    """transformers' printed lines, also without curvature."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        super().on_log(args, state, control, logs=_without_curvature(logs), **kwargs)


def keep_curvature_off_the_console(callbacks: list[TrainerCallback]) -> None:
    """Make transformers' console callbacks leave out the curvature, which is for trackers.

    The list is changed in place: the order of the callbacks and their counters stay. Subclasses of these callbacks stay
    unchanged.
    """
    for callback in callbacks:
        if type(callback) is ProgressCallback:
            callback.__class__ = QuietProgress
        elif type(callback) is PrinterCallback:
            callback.__class__ = QuietPrinter


def _without_curvature(logs: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if not name.startswith(TELEMETRY_PREFIX)}


def _is_logged(step: int, args: TrainingArguments, state: TrainerState, batches: Any) -> bool:
    """Whether the Trainer will log after this step. Its own `DefaultFlowCallback` decides so only after the step."""
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy == IntervalStrategy.EPOCH and has_length(batches):
        return step % math.ceil(len(batches) / args.gradient_accumulation_steps) == 0
    return False


def second_order_optimizer(optimizer: Any) -> SecondOrderOptimizer | None:
    """Our optimizer, taken out of accelerate's wrapper; None if it is another one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, SecondOrderOptimizer) else None
