"""What people train: small float64 models with a padded batch, and where their losses have rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from shared.helpers import SMALL, in_float64, llama, t5
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

TOKENS = torch.randint(1, 32, (4, 10), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([10, 6, 8, 5])
ONE_EACH = torch.ones(4, dtype=torch.bool)


@dataclass
class Task:
    """A model, its batch, and the loss as a sum over what counts as a row.

    Args:
        model: makes a fresh one.
        inputs: its arguments, the labels among them.
        row_losses: maps logits and labels, of the batch or a part of it, to losses whose sum is N times the training
            loss; of single rows, unless it is a loss of pairs.
        places: where a prediction has a loss, (batch, positions) or (batch,); N of them.
        own_loss: whether the model computes this loss itself, and in float64.
        independent: whether labels are a yes or no for each class.
    """

    model: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    row_losses: Callable[[Tensor, Tensor], Tensor]
    places: Tensor
    own_loss: bool = True
    independent: bool = False

    @property
    def rows(self) -> int:
        return int(self.places.sum())

    def parts(self, count: int) -> list[dict[str, Tensor]]:
        """The batch as micro-batches."""
        chunks = {key: value.chunk(count) for key, value in self.inputs.items()}
        return [{key: chunks[key][part] for key in chunks} for part in range(count)]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, the padding on one side."""
    places = torch.arange(10)
    mask = places < LENGTHS[:, None] if side == "right" else places >= 10 - LENGTHS[:, None]
    return torch.where(mask, TOKENS, 0), mask.long()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def before(labels: Tensor) -> Tensor:
    """Where a causal model predicts a label, (batch, positions)."""
    return nn.functional.pad(labels[:, 1:] != -100, (0, 1), value=False)


def some_labels(mask: Tensor, share: float) -> Tensor:
    chosen = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < share
    return torch.where((mask == 1) & chosen, TOKENS, -100)


def causal_lm(side: str) -> Task:
    tokens, mask = padded(side)
    labels = some_labels(mask, 0.6)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    # The model's own loss is computed in float32.
    return Task(lambda: in_float64(llama()), inputs, shifted, before(labels), own_loss=False)


def bert(kind: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    return kind(config).double()


def masked_lm(side: str) -> Task:
    tokens, mask = padded(side)
    labels = some_labels(mask, 0.3)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return Task(lambda: bert(BertForMaskedLM), inputs, cross_entropy, labels != -100)


def token_classifier(side: str) -> Task:
    tokens, mask = padded(side)
    labels = torch.where(mask == 1, TOKENS % 3, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    model = lambda: bert(BertForTokenClassification, num_labels=3)  # noqa: E731
    return Task(model, inputs, cross_entropy, mask == 1)


def classifier(side: str) -> Task:
    tokens, mask = padded(side)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": TOKENS[:, 0] % 3}
    return Task(lambda: bert(BertForSequenceClassification, num_labels=3), inputs, cross_entropy, ONE_EACH)


def causal_classifier(side: str) -> Task:
    tokens, mask = padded(side)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": TOKENS[:, 0] % 3}

    def model() -> nn.Module:
        torch.manual_seed(0)
        return in_float64(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))

    return Task(model, inputs, cross_entropy, ONE_EACH)


def multi_label(side: str) -> Task:
    tokens, mask = padded(side)
    labels = (TOKENS[:, :5] % 2).double()
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)

    kind = {"num_labels": 5, "problem_type": "multi_label_classification"}
    return Task(lambda: bert(BertForSequenceClassification, **kind), inputs, losses, ONE_EACH, independent=True)


def seq2seq(side: str) -> Task:
    """Both sides padded to one length, and differently."""
    tokens, mask = padded(side)
    labels = torch.where(mask.flip(0) == 1, TOKENS.flip(1), -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    return Task(lambda: in_float64(t5()), inputs, cross_entropy, labels != -100)


def pairs(side: str) -> Task:
    """Even rows are to be preferred to odd ones, as in DPO: no sum over tokens. N is how many have a gradient."""
    tokens, mask = padded(side)
    labels = some_labels(mask, 0.6)
    places = before(labels)

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        scores = -shifted(logits, labels).reshape(len(labels), -1).sum(dim=1)
        # The mean over the two pairs, times N.
        return -nn.functional.logsigmoid(0.1 * (scores[0::2] - scores[1::2])) / 2 * places.sum()

    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return Task(lambda: in_float64(llama()), inputs, losses, places, own_loss=False)


TASKS = {
    task.__name__: task
    for task in (
        causal_lm, masked_lm, token_classifier, classifier, causal_classifier, multi_label, seq2seq, pairs
    )
}  # fmt: skip
