"""Perplexity and token accuracy against closed forms and torch's own loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM

from hf_so2.errors import ConfigurationError
from hf_so2.metrics import Perplexity, TokenAccuracy, causal_lm_metrics, summarize_logits


@given(probabilities=st.lists(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), min_size=1, max_size=5))
def test_perplexity_is_the_geometric_mean_of_inverse_probabilities(probabilities: list[list[float]]) -> None:
    metric = Perplexity(keep_in_memory=True)
    for sequence in probabilities:  # batches of unequal weight
        metric.add_batch(nll=[-math.fsum(map(math.log, sequence))], tokens=[len(sequence)])
    every = [probability for sequence in probabilities for probability in sequence]
    assert metric.compute()["perplexity"] == pytest.approx(math.prod(every) ** (-1 / len(every)))


def test_a_uniform_model_has_the_vocabulary_s_size_as_perplexity() -> None:
    labels = torch.arange(12).reshape(2, 6)
    summary = summarize_logits(torch.zeros(2, 6, 50), labels)
    prediction = EvalPrediction(predictions=summary.numpy(), label_ids=labels.numpy())
    assert causal_lm_metrics(prediction)["perplexity"] == pytest.approx(50)


def test_the_summary_agrees_with_the_model_s_loss_and_leaves_masked_tokens_out(
    tiny_llama: LlamaConfig,
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama)
    labels = torch.randint(0, tiny_llama.vocab_size, (3, 10))
    inputs = labels.clone()
    labels[0, 4:] = -100
    labels[1, 0] = -100
    with torch.no_grad():
        output = model(input_ids=inputs, labels=labels)
    summary = summarize_logits((output.logits, None), labels)
    nll, correct, tokens = summary.double().sum(0)
    assert summary[:, 2].tolist() == [3, 9, 9]
    assert float(nll / tokens) == pytest.approx(float(output.loss), rel=1e-6)
    guesses = output.logits.argmax(-1)
    assert int(correct) == sum(
        int(guesses[row, column - 1] == labels[row, column])
        for row in range(3)
        for column in range(1, 10)
        if labels[row, column] != -100
    )
    metrics = causal_lm_metrics(EvalPrediction(predictions=summary.numpy(), label_ids=labels.numpy()))
    assert metrics["perplexity"] == pytest.approx(math.exp(float(output.loss)), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(int(correct) / 21)


def test_accuracy_counts_tokens_not_sequences() -> None:
    metric = TokenAccuracy(keep_in_memory=True)
    assert metric.compute(correct=np.array([1, 0]), tokens=np.array([1, 9])) == {"token_accuracy": 0.1}


def test_overflow_is_infinite_and_nothing_to_count_is_refused() -> None:
    assert Perplexity(keep_in_memory=True).compute(nll=[1e6], tokens=[1]) == {"perplexity": math.inf}
    for metric, inputs in ((Perplexity, {"nll": [0.0]}), (TokenAccuracy, {"correct": [0]})):
        with pytest.raises(ConfigurationError, match="tokens=0: must be positive"):
            metric(keep_in_memory=True).compute(**inputs, tokens=[0])
