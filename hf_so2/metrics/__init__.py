"""Metrics of language models as ``evaluate`` modules that need no download, and their bridge to Trainer."""

from hf_so2.metrics.causal_lm import causal_lm_metrics, summarize_logits
from hf_so2.metrics.perplexity import Perplexity
from hf_so2.metrics.token_accuracy import TokenAccuracy

__all__ = ["Perplexity", "TokenAccuracy", "causal_lm_metrics", "summarize_logits"]
