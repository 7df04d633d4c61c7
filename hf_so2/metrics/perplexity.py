"""Perplexity from summed negative log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate

from hf_so2.errors import ConfigurationError


class Perplexity(evaluate.Metric):
    """``exp(Σ nll / Σ tokens)``: the geometric mean of 1/probability over all tokens, however batched.

    The mean of per-batch losses or of per-sequence perplexities is another number as soon as sequences differ
    in length; sums and counts are exact. Inputs of ``compute`` and ``add_batch``, one entry per sequence:

    * ``nll``: negative log-likelihood summed over the sequence's tokens, in nats.
    * ``tokens``: how many tokens that sum covers.

    ``compute`` returns ``{"perplexity": float}``, infinity where the exponential overflows, and raises
    :class:`ConfigurationError` when no token was counted.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity from summed negative log-likelihoods and token counts.",
            citation="",
            inputs_description="nll: summed negative log-likelihood, tokens: their number; per sequence",
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
        total = sum(tokens)
        if total == 0:
            raise ConfigurationError("tokens", total, "must be positive: there is nothing to evaluate")
        try:
            return {"perplexity": math.exp(math.fsum(nll) / total)}
        except OverflowError:
            return {"perplexity": math.inf}
