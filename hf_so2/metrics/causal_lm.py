"""What the Trainer calls: logits to three numbers per sequence at once, and those to metrics at the end.

Keeping the logits of an evaluation set, ``[sequences, length, vocabulary]``, takes gigabytes; their sums take
bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

from hf_so2.metrics.perplexity import Perplexity
from hf_so2.metrics.token_accuracy import TokenAccuracy

IGNORED = -100  # the label that transformers' losses leave out


def summarize_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Trainer's ``preprocess_logits_for_metrics``: what the metrics need of one batch.

    Args:
        logits: ``[batch, length, vocabulary]``, any floating dtype, or a tuple that begins with them.
        labels: int64 ``[batch, length]``, not shifted; positions with -100 do not count.

    Returns:
        float32 ``[batch, 3]``: summed negative log-likelihood in nats, correct tokens, counted tokens. The
        counts are exact below 2^24 tokens in a sequence.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    predictions, targets = logits[:, :-1].float(), labels[:, 1:]
    nll = functional.cross_entropy(predictions.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    counted = targets != IGNORED
    correct = (predictions.argmax(-1) == targets) & counted
    return torch.stack([nll.sum(1), correct.sum(1).float(), counted.sum(1).float()], dim=1)


def causal_lm_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's ``compute_metrics``: perplexity and token accuracy from :func:`summarize_logits`' output."""
    nll, correct, tokens = prediction.predictions.astype("float64").T
    counts = tokens.astype("int64")
    # In memory: the default is a locked file in a cache folder, which concurrent evaluations would fight
    # over.
    perplexity = Perplexity(keep_in_memory=True).compute(nll=nll, tokens=counts)
    accuracy = TokenAccuracy(keep_in_memory=True).compute(correct=correct.astype("int64"), tokens=counts)
    return {**perplexity, **accuracy}
