"""Statistics of what people train against dense rows: which count, and their scale, with padding and accumulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from curvature.dense_fisher import STANDSTILL, relative
from helpers import SMALL, DenseFactors, dense_factors, in_float64, llama, rows_that_count, t5
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import hf_so2

Inputs = dict[str, Tensor]
METHODS = ("kfac", "foof", "ekfac", "tkfac", "tekfac")
TOKENS = torch.randint(1, 32, (4, 10), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([10, 6, 8, 5])


@dataclass
class Task:
    """A model, its batch, and the loss as a sum over what counts as a row.

    Args:
        model: makes a fresh one.
        inputs: its arguments, the labels among them.
        row_losses: maps logits and the labels to the losses of single rows, 0 where there is none.
        rows: how many have one.
        loss: the training loss of a forward pass; by default the model's own.
    """

    model: Callable[[], nn.Module]
    inputs: Inputs
    row_losses: Callable[[Tensor, Tensor], Tensor]
    rows: int
    loss: Callable[[Any, Inputs], Tensor] = lambda outputs, inputs: outputs.loss


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, the padding on one side."""
    places = torch.arange(10)
    mask = places < LENGTHS[:, None] if side == "right" else places >= 10 - LENGTHS[:, None]
    return torch.where(mask, TOKENS, 0), mask.long()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def some_labels(mask: Tensor, share: float) -> Tensor:
    chosen = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < share
    return torch.where((mask == 1) & chosen, TOKENS, -100)


def causal_lm(side: str) -> Task:
    tokens, mask = padded(side)
    labels = some_labels(mask, 0.6)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    rows = int((labels[:, 1:] != -100).sum())

    def loss(outputs: Any, _: Inputs) -> Tensor:
        return shifted(outputs.logits, labels).sum() / rows  # the model's own is computed in float32

    return Task(lambda: in_float64(llama()), inputs, shifted, rows, loss)


def bert(kind: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    return kind(config).double()


def masked_lm(side: str) -> Task:
    tokens, mask = padded(side)
    labels = some_labels(mask, 0.3)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return Task(lambda: bert(BertForMaskedLM), inputs, cross_entropy, int((labels != -100).sum()))


def token_classifier(side: str) -> Task:
    tokens, mask = padded(side)
    labels = torch.where(mask == 1, TOKENS % 3, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    model = lambda: bert(BertForTokenClassification, num_labels=3)  # noqa: E731
    return Task(model, inputs, cross_entropy, int(mask.sum()))


def classifier(side: str) -> Task:
    tokens, mask = padded(side)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": TOKENS[:, 0] % 3}
    return Task(lambda: bert(BertForSequenceClassification, num_labels=3), inputs, cross_entropy, 4)


def causal_classifier(side: str) -> Task:
    tokens, mask = padded(side)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": TOKENS[:, 0] % 3}

    def model() -> nn.Module:
        torch.manual_seed(0)
        return in_float64(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))

    return Task(model, inputs, cross_entropy, 4)


def multi_label(side: str) -> Task:
    tokens, mask = padded(side)
    labels = (TOKENS[:, :5] % 2).double()
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)

    kind = {"num_labels": 5, "problem_type": "multi_label_classification"}
    return Task(lambda: bert(BertForSequenceClassification, **kind), inputs, losses, 4)


def seq2seq(side: str) -> Task:
    """Both sides padded to one length, and differently."""
    tokens, mask = padded(side)
    labels = torch.where(mask.flip(0) == 1, TOKENS.flip(1), -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    return Task(lambda: in_float64(t5()), inputs, cross_entropy, int((labels != -100).sum()))


def pairs(side: str) -> Task:
    """Rows 0 and 1 are to be preferred to rows 2 and 3, as in DPO: no sum over tokens. N is how many have a gradient"""
    tokens, mask = padded(side)
    labels = some_labels(mask, 0.6)
    inputs = {"input_ids": tokens, "attention_mask": mask}

    def preference(logits: Tensor) -> Tensor:
        scores = -shifted(logits, labels).reshape(4, -1).sum(dim=1)
        return -nn.functional.logsigmoid(0.1 * (scores[:2] - scores[2:])).mean()

    rows = int((labels[:, 1:] != -100).sum())
    row_losses = lambda logits, _: preference(logits) * rows  # noqa: E731
    return Task(lambda: in_float64(llama()), inputs, row_losses, rows, lambda outputs, _: preference(outputs.logits))


TASKS = {
    task.__name__: task
    for task in (
        causal_lm, masked_lm, token_classifier, classifier, causal_classifier, multi_label, seq2seq, pairs
    )
}  # fmt: skip
MEANS_OVER_EXAMPLES = ("classifier", "causal_classifier", "multi_label")


def dense(task: Task, names: list[str]) -> dict[str, DenseFactors]:
    """`h` and the derivative of the summed losses of rows by `u`, of every layer."""
    model = task.model()
    labels = task.inputs.get("labels", torch.zeros(0))

    class Predictions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, _: Tensor) -> Tensor:
            inputs = {key: value for key, value in task.inputs.items() if key != "labels"}
            if "decoder_input_ids" not in inputs and model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
            return model(**inputs).logits

    wrapped = Predictions()
    modules = {name: wrapped.get_submodule(f"model.{name.removesuffix('.weight')}") for name in names}
    return dense_factors(
        wrapped, modules, lambda logits, _: task.row_losses(logits, labels).sum(), (task.inputs["input_ids"],)
    )


def stand_still(name: str, task: Task, parts: int = 1, **settings: Any) -> hf_so2.SecondOrderOptimizer:
    """Two steps, since the first builds the bases in which EKFAC's second measures S."""
    model = task.model().train()
    optimizer = hf_so2.build_optimizer(name, model, **(STANDSTILL | {"damping": 0.1} | settings))
    for _ in range(2):
        for part in range(parts):
            inputs = {key: value.chunk(parts)[part] for key, value in task.inputs.items()}
            outputs = model(**inputs)
            loss = task.loss(outputs, inputs) / parts
            optimizer.sample_fisher(outputs.logits, loss=loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_dense(name: str, optimizer: hf_so2.SecondOrderOptimizer, task: Task) -> None:
    layers = optimizer.curvature.layers
    expected = dense(task, list(layers))
    live = rows_that_count(expected)
    for layer, rows in expected.items():
        state, n = layers[layer].state, task.rows
        h, delta = rows.inputs[live[layer]].numpy(), rows.deltas[live[layer]].numpy()
        if not delta.any():
            continue
        found = {key: (state[key] / state["weight"]).numpy() for key in ("A", "B", "tau") if key in state}
        if name in ("tkfac", "tekfac"):
            longer, shorter = (h**2).sum(1, keepdims=True), (delta**2).sum(1, keepdims=True)
            wanted = {"A": (h * shorter).T @ h / n, "B": (delta * longer).T @ delta / n}
        else:
            wanted = {"A": h.T @ h / len(h), "B": delta.T @ delta / n}
        for key, value in wanted.items():
            if key in found:
                assert relative(found[key], value) < 1e-10, (layer, key)
        if "S" in state:
            rotated = (delta @ state["B_basis"].numpy()) ** 2, (h @ state["A_basis"].numpy()) ** 2
            assert relative(state["S"].numpy(), rotated[0].T @ rotated[1] / n) < 1e-8, layer
        gradient = delta.T @ h / n
        if name == "kfac":
            a, b = (found[key] + 0.1 * np.eye(len(found[key])) for key in "AB")
            step = layers[layer].block.precondition(state, torch.from_numpy(gradient)).numpy()
            assert relative(step, np.linalg.solve(b, gradient) @ np.linalg.inv(a)) < 1e-8, layer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_statistics_are_those_of_the_rows_that_a_loss_depends_on(name: str, task: str, side: str) -> None:
    case = TASKS[task](side)
    assert_dense(name, stand_still(name, case), case)


@pytest.mark.parametrize("task", MEANS_OVER_EXAMPLES)
def test_accumulation_changes_no_factor(task: str) -> None:
    case = TASKS[task]("right")
    assert_dense("kfac", stand_still("kfac", case, parts=2), case)


@pytest.mark.parametrize("task", [name for name in TASKS if name != "pairs"])
def test_labels_are_drawn_where_the_loss_has_its_own(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws that are the most probable labels, known to the oracle as well."""
    case = TASKS[task]("right")
    independent = task == "multi_label"
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmax(dim=1, keepdim=True))
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: (p > 0.5).to(p))
    model = case.model().train()
    optimizer = hf_so2.build_optimizer("kfac", model, fisher="mc", **STANDSTILL, damping=0.1)
    outputs = model(**case.inputs)
    optimizer.sample_fisher(outputs.logits, loss=outputs.loss, independent=independent)
    outputs.loss.backward()
    optimizer.step()

    labels, logits = case.inputs["labels"], outputs.logits.detach()
    drawn = (logits > 0).double() if independent else logits.argmax(dim=-1)
    if not independent and labels.shape == drawn.shape:
        if task == "causal_lm":
            drawn = drawn.roll(1, dims=1)
        drawn = torch.where(labels == -100, -100, drawn)
    inputs = case.inputs | {"labels": drawn}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    assert_dense("kfac", optimizer, Task(case.model, inputs, case.row_losses, case.rows))
