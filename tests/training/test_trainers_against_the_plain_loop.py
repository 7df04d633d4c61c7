"""Trainers of other kinds against a loop written out: statistics and weights of some steps in float64; resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.dense_rows import dense_layers
from shared.helpers import (
    VOCABULARY,
    assert_same_parameters,
    captured_factors,
    in_float64,
    llama,
    optimizer_of,
    relative_error,
    t5,
    token_rows,
)
from shared.tasks import TASKS, Task
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import hf_so2

Batch = dict[str, Tensor]
STEPS, PARTS = 3, 2
TOLERANCE = 1e-10


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 16, "pad_token_id": 0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_ffn_dim": 24, f"{side}_attention_heads": 2}
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    marks = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(**sizes, **none, **marks)).double()


MODELS: dict[str, Callable[[], nn.Module]] = {"t5": lambda: in_float64(t5()), "bart": bart}


class OwnLoop(Trainer):
    """A focal loss, and a training step that asks nothing of transformers' one."""

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses, outputs = focal(model, inputs)
        loss = losses.sum() / (num_items_in_batch if self.loss_is_scaled_for_ga else len(losses))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        if not self.loss_is_scaled_for_ga:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OfWholeStep(OwnLoop):
    loss_is_scaled_for_ga = True


class OfEachPart(OwnLoop):
    loss_is_scaled_for_ga = False


def focal(model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    log_p = outputs.logits[:, :-1].log_softmax(-1)[counted].gather(1, labels[counted][:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p, outputs


def trainer_of(kind: type, arguments: type, folder: Path, model: nn.Module, rows: Any, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "optim": "kfac",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": PARTS,
        "max_steps": STEPS,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
    }
    args = hf_so2.second_order_arguments(arguments)(str(folder), **(fields | changes))
    return hf_so2.second_order(kind)(model=model, args=args, train_dataset=rows)


class Batches:
    """Keeps the micro-batches that a trainer differentiates, with the Trainer's count of items."""

    def __init__(self, trainer: Any) -> None:
        self.seen: list[tuple[Batch, Any]] = []
        step = trainer.training_step

        def recording(model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Any:
            self.seen.append(({name: value.clone() for name, value in inputs.items()}, num_items_in_batch))
            return step(model, inputs, num_items_in_batch)

        trainer.training_step = recording


def loop_over_whole_steps(model: nn.Module, seen: list[tuple[Batch, Any]], losses_of: Callable[..., Tensor]) -> Any:
    """The loss is the mean over the rows of a step, whose parts go backward together."""
    optimizer = hf_so2.build_optimizer("kfac", model)
    for start in range(0, len(seen), PARTS):
        losses = [losses_of(model, batch) for batch, _ in seen[start : start + PARTS]]
        torch.cat(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def loop_over_parts(
    model: nn.Module, seen: list[tuple[Batch, Any]], losses_of: Callable[..., Tensor], share: float
) -> Any:
    """The loss is `share` times the sum of the means over each part."""
    optimizer = hf_so2.build_optimizer("kfac", model)
    for number, (batch, _) in enumerate(seen):
        optimizer.announce(None, share, is_mean=True)
        (share * losses_of(model, batch).mean()).backward()
        if number % PARTS == PARTS - 1:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def assert_equal_runs(trainer: Any, optimizer: Any, model: nn.Module) -> None:
    expected, found = captured_factors(optimizer), captured_factors(optimizer_of(trainer))
    assert found.keys() == expected.keys()
    assert found
    for name, factors in found.items():
        for side, factor in factors.items():
            assert relative_error(factor, expected[name][side]) < TOLERANCE, (name, side)
    weights = dict(model.named_parameters())
    for name, weight in trainer.model.named_parameters():
        if name.endswith("k_proj.bias"):  # moves by round-off alone: softmax does not see it
            assert weight.abs().max() < TOLERANCE
            continue
        assert relative_error(weight, weights[name]) < TOLERANCE, name


def seq2seq_losses(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    losses = nn.functional.cross_entropy(model(**batch).logits.mT, labels, reduction="none")
    return losses[labels != -100]


def seq2seq_rows(count: int = 24) -> list[Batch]:
    """Encoder and decoder padded to different lengths."""
    rows = []
    for row, other in zip(token_rows(count, padded=True), token_rows(count, 7, padded=True, seed=1), strict=True):
        labels = torch.where(other["attention_mask"] == 1, other["input_ids"], -100)
        rows.append({"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels})
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_seq2seq_trains_like_the_plain_loop(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(Seq2SeqTrainer, Seq2SeqTrainingArguments, tmp_path, MODELS[name](), seq2seq_rows())
    batches = Batches(trainer)
    trainer.train()
    assert len(batches.seen) == STEPS * PARTS
    assert len({int((batch["labels"] != -100).sum()) for batch, _ in batches.seen}) > 1
    # These models average over each part, and the Trainer divides by the number of parts unless the model's signature
    # says that it takes the count of the step.
    share = 1.0 if trainer.model_accepts_loss_kwargs else 1 / PARTS
    model = MODELS[name]().train()
    assert_equal_runs(trainer, loop_over_parts(model, batches.seen, seq2seq_losses, share), model)
    assert {"loss", "curvature/mlp/damping_A", "curvature/attention/update_rms"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_seq2seq_statistics_are_the_dense_ones(name: str, side: str, tmp_path: Path) -> None:
    case: Task = dataclasses.replace(TASKS["seq2seq"](side), model=MODELS[name])
    rows = [{key: value[row] for key, value in case.inputs.items()} for row in range(4)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 2}
    trainer = trainer_of(Seq2SeqTrainer, Seq2SeqTrainingArguments, tmp_path, case.model(), rows, **settings)
    trainer.train()
    found, expected = captured_factors(optimizer_of(trainer)), dense_layers(case, "empirical")
    compared = found.keys() & expected.keys()
    assert len(compared) > len(found) / 2
    for layer in compared:
        for key, value in zip(("A", "B"), expected[layer].factors, strict=True):
            assert relative_error(found[layer][key], torch.from_numpy(value)) < TOLERANCE, (layer, key)


def focal_losses(model: nn.Module, batch: Batch) -> Tensor:
    return focal(model, batch)[0]


def test_an_own_loss_and_loop_train_like_the_plain_loop(tmp_path: Path) -> None:
    rows = token_rows(24, padded=True)
    trainer = trainer_of(OfWholeStep, TrainingArguments, tmp_path, in_float64(llama()), rows)
    batches = Batches(trainer)
    trainer.train()
    model = in_float64(llama()).train()
    optimizer = loop_over_whole_steps(model, batches.seen, focal_losses)
    assert_equal_runs(trainer, optimizer, model)
    assert {"loss", "curvature/mlp/damping_A", "curvature/attention/update_rms"} <= trainer.state.log_history[0].keys()


def test_an_own_loss_that_is_a_mean_of_each_part_counts_so(tmp_path: Path) -> None:
    """The documented way to say so: `loss_is_scaled_for_ga = False`, and in a loop `announce(..., is_mean=True)`."""
    rows = token_rows(24, padded=True)
    trainer = trainer_of(OfEachPart, TrainingArguments, tmp_path, in_float64(llama()), rows)
    batches = Batches(trainer)
    trainer.train()
    model = in_float64(llama()).train()
    optimizer = loop_over_parts(model, batches.seen, focal_losses, 1 / PARTS)
    assert_equal_runs(trainer, optimizer, model)


@pytest.mark.parametrize("kind", ["seq2seq", "own"])
def test_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """With dropout, whose random numbers go on as well, and gradients accumulated over padded batches."""

    def make() -> Any:
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
        if kind == "own":
            model = llama(attention_dropout=0.1)
            return trainer_of(OfWholeStep, TrainingArguments, tmp_path, model, token_rows(32, padded=True), **settings)
        model = bart().float()
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.1
        return trainer_of(Seq2SeqTrainer, Seq2SeqTrainingArguments, tmp_path, model, seq2seq_rows(32), **settings)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(resumed.model, whole.model)
    for name, layer in optimizer_of(resumed).curvature.layers.items():
        for key, value in layer.state.items():
            expected = optimizer_of(whole).curvature.layers[name].state[key]
            assert not isinstance(value, Tensor) or torch.equal(value, expected), (name, key)
