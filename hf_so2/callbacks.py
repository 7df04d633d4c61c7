"""Trainer callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_so2.optim import SecondOrderOptimizer


class DiscardStaleCaptures(TrainerCallback):
    """Start every step with empty sums.

    A step can end without `optimizer.step()`: a loss scaler skips it after an overflow, `auto_find_batch_size` starts
    over, training is interrupted and `train()` called again. What was captured for it must not enter the next step.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        inner = getattr(optimizer, "optimizer", optimizer)
        if isinstance(inner, SecondOrderOptimizer):
            inner.discard_captures()
