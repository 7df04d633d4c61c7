"""Accuracy of the most probable next token."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from hf_so2.errors import ConfigurationError


class TokenAccuracy(evaluate.Metric):
    """The fraction of tokens that the model ranked first, over all tokens of all sequences.

    Inputs of ``compute`` and ``add_batch``, one entry per sequence: ``correct``, the number of tokens whose
    most probable prediction was right, and ``tokens``, the number of tokens predicted. ``compute`` returns
    ``{"token_accuracy": float}`` and raises :class:`ConfigurationError` when no token was counted.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of tokens that a language model ranked first.",
            citation="",
            inputs_description="correct: tokens predicted correctly, tokens: tokens predicted; per sequence",
            features=datasets.Features({"correct": datasets.Value("int64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, correct: Sequence[int], tokens: Sequence[int]) -> dict[str, float]:
        total = sum(tokens)
        if total == 0:
            raise ConfigurationError("tokens", total, "must be positive: there is nothing to evaluate")
        return {"token_accuracy": sum(correct) / total}
