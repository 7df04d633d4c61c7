"""What the Trainer does around a step: a second call, skipped steps, schedules, logs and events of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import SMALL, arguments, assert_same_parameters, llama, optimizer_of, token_rows, trained
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

import hf_so2


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_second_call_of_train_neither_doubles_hooks_nor_loses_state(tmp_path: Path) -> None:
    trainer = hf_so2.SecondOrderTrainer(model=llama(), args=arguments(tmp_path), train_dataset=token_rows())
    trainer.train()
    optimizer, count = optimizer_of(trainer), hooks(trainer.model)
    assert len(optimizer.curvature.layers) == 14
    trainer.train()
    assert optimizer_of(trainer) is optimizer
    assert hooks(trainer.model) == count
    assert optimizer.steps == 6
    rows = 16 * 9  # one batch, seen once; the last token predicts nothing
    assert not optimizer.curvature.capture.take().layers
    trainer.model.train()
    batch = torch.stack([row["input_ids"] for row in token_rows(16)])
    optimizer.curvature.prepare(1)
    trainer.model(input_ids=batch, labels=batch).loss.backward()
    assert {int(sums.rows) for sums in optimizer.curvature.capture.take().layers.values()} == {rows}


class Interrupt(TrainerCallback):
    """Ends training in the middle of an accumulated step, as an exception in the data or a Ctrl-C does."""

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_interrupted_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """What was captured for a step that never came must not enter the first step of the next `train()`."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    clean = trained(llama(), token_rows(), tmp_path, **settings)
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(), args=arguments(tmp_path, **settings), train_dataset=token_rows(), callbacks=[Interrupt()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.model.zero_grad()
    trainer.train()
    for name, layer in optimizer_of(trainer).curvature.layers.items():
        reference = optimizer_of(clean).curvature.layers[name].state
        torch.testing.assert_close(layer.state["A"], reference["A"])
        torch.testing.assert_close(layer.state["B"], reference["B"])


class PoisonGradient(TrainerCallback):
    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            next(model.parameters()).grad.fill_(float("nan"))


def test_nan_gradient_in_the_trainer_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(),
        args=arguments(tmp_path, max_steps=5),
        train_dataset=token_rows(),
        callbacks=[PoisonGradient({1, 3})],
    )
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 2)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_nan_that_never_ends_stops_training(tmp_path: Path) -> None:
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(),
        args=arguments(tmp_path, max_steps=40, per_device_train_batch_size=4),
        train_dataset=token_rows(),
        callbacks=[PoisonGradient(set(range(100)))],
    )
    with pytest.raises(hf_so2.TrainingDivergedError, match="20 steps in a row"):
        trainer.train()
    assert_same_parameters(trainer.model, llama())


def test_logged_rate_is_the_base_rate_times_the_schedule(tmp_path: Path) -> None:
    trainer = trained(
        llama(32),
        token_rows(),
        tmp_path,
        optim="adamw_mup",
        mup_base_width=16,
        learning_rate=0.01,
        lr_scheduler_type="linear",
        max_steps=4,
        logging_strategy="steps",
        logging_steps=1,
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    plain = trained(llama(), token_rows(), tmp_path, max_steps=4)
    trainer = hf_so2.SecondOrderTrainer(
        model=llama(),
        args=arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8, seed=5),
    )
    trainer.train()
    assert_same_parameters(trainer.model, plain.model)


def test_clipped_gradients_do_not_change_the_statistics(tmp_path: Path) -> None:
    """Clipping comes after backward: factors are those of the unclipped gradient."""
    clipped, free = (trained(llama(), token_rows(), tmp_path, max_steps=1, max_grad_norm=n) for n in (1e-3, 1e9))
    for name, layer in optimizer_of(clipped).curvature.layers.items():
        assert torch.equal(layer.state["B"], optimizer_of(free).curvature.layers[name].state["B"])


def test_batches_without_token_labels_train(tmp_path: Path) -> None:
    """A classifier has one label per example; nothing is announced and the rows a layer saw are counted."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_labels=3)
    rows = [{**row, "labels": row["input_ids"][0] % 3} for row in token_rows()]
    trainer = trained(LlamaForSequenceClassification(config), rows, tmp_path)
    assert optimizer_of(trainer).steps == 3
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
