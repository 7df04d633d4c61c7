"""Which rows count: padding, packed documents, and losses that call no head."""

from __future__ import annotations

import pytest
import torch
from shared.helpers import SMALL, captured_factors, in_float64, llama, relative_error, t5
from shared.loops import NAMES
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import hf_so2


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).double()


def llama_classifier() -> nn.Module:
    torch.manual_seed(0)
    return in_float64(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))


def padded(values: Tensor, length: int, side: str, by: int = 0) -> Tensor:
    more = length - values.shape[1]
    return nn.functional.pad(values, (0, more) if side == "right" else (more, 0), value=by)


def classification(length: int, side: str) -> dict[str, Tensor]:
    tokens = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    # Told, since a model left to itself counts the padding before a text as part of it.
    inputs["position_ids"] = torch.arange(12).expand(4, -1)
    return {key: padded(value, length, side) for key, value in inputs.items()} | {"labels": tokens[:, 0] % 3}


def translation(length: int, side: str) -> dict[str, Tensor]:
    """The decoder's side is shorter than the encoder's, unless both are padded to one length."""
    tokens, labels = torch.randint(1, 32, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": padded(tokens, length, side),
        "attention_mask": padded(torch.ones_like(tokens), length, side),
        "labels": padded(labels[:, :9], 9 if length == 12 else length, "right", by=-100),
    }


# Models with their inputs and the sides that they can be padded on: BERT reads the first position.
PADDED = {
    "bert-right": (bert, classification, "right"),
    "llama-right": (llama_classifier, classification, "right"),
    "llama-left": (llama_classifier, classification, "left"),
    "t5-right": (lambda: in_float64(t5()), translation, "right"),
    "t5-left": (lambda: in_float64(t5()), translation, "left"),
}


def trained_padded(name: str, case: str, length: int) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Factors and update of two steps."""
    build, inputs, side = PADDED[case]
    model = build()
    start = parameters_to_vector(model.parameters()).detach()
    whole = {} if name == "adamw" else {"fallback_warmup_steps": 1}
    optimizer = hf_so2.build_optimizer(name, model, **whole)
    for _ in range(2):
        model(**inputs(length, side)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    factors = {} if optimizer.curvature is None else captured_factors(optimizer)
    return factors, parameters_to_vector(model.parameters()).detach() - start


@pytest.mark.parametrize("case", PADDED)
@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_padding_changes_nothing(name: str, case: str) -> None:
    """A batch of 12 positions, and the same one padded to 48."""
    (expected, update), (found, padded_update) = (trained_padded(name, case, length) for length in (12, 48))
    for layer, factors in expected.items():
        for key, value in factors.items():
            assert relative_error(found[layer][key], value) < 1e-10, (layer, key)
    assert relative_error(padded_update, update) < 1e-10


def test_packed_documents_are_no_sequence() -> None:
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, weight_sharing="reduce")
    tokens = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=tokens, position_ids=torch.arange(8)[None], labels=tokens).loss.backward()
    optimizer.step()
    with pytest.raises(hf_so2.ConfigurationError, match=r"^weight_sharing='reduce': .*packed documents.*expand"):
        model(input_ids=tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), labels=tokens)


def _completions(seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and shifted labels, of which a prompt and the last position have none."""
    ids = torch.randint(1, SMALL["vocab_size"], (3, 10), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    labels[:, :4] = labels[:, -1] = -100
    return ids, labels


def _loss_of_completions(model: nn.Module, seed: int, *, fused: bool) -> Tensor:
    ids, labels = _completions(seed)
    if fused:  # as TRL and Liger do: the head's weight is multiplied by, the head is not called
        logits = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight.T
    else:
        logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("fused", [(True, True), (True, False), (False, True)], ids=["fused", "first", "second"])
@pytest.mark.parametrize("announced", [False, True], ids=["silent", "announced"])
def test_rows_with_a_loss_are_counted_where_no_head_is_called(announced: bool, fused: tuple[bool, bool]) -> None:
    """Prompts have no loss but keys and values that others read: layers alone cannot tell how many rows have one."""
    found = []
    for kinds in (fused, (False, False)):
        model = in_float64(llama()).train()
        optimizer = hf_so2.build_optimizer("kfac", model)
        for seed, kind in enumerate(kinds):
            if announced:
                optimizer.announce(None, 0.5, is_mean=True)
            (_loss_of_completions(model, seed, fused=kind) / 2).backward()
        optimizer.step()
        found.append(captured_factors(optimizer))
    for name, factors in found[0].items():
        for side, factor in factors.items():
            assert relative_error(factor, found[1][name][side]) < 1e-12, (name, side)


def test_one_backward_pass_of_both_kinds_of_loss_counts_each_once() -> None:
    found = []
    for fused in (True, False):
        model = in_float64(llama()).train()
        optimizer = hf_so2.build_optimizer("kfac", model)
        sum(_loss_of_completions(model, seed, fused=fused and seed == 1) for seed in range(2)).backward()
        optimizer.step()
        found.append(captured_factors(optimizer))
    for name, factors in found[0].items():
        for side, factor in factors.items():
            assert relative_error(factor, found[1][name][side]) < 1e-12, (name, side)
