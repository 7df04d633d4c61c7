"""Which rows count: padding, packed documents, and losses that call no head."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL, captured_factors, in_float64, llama, relative_error
from optim.loops import NAMES
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import hf_so2


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_classifier(name: str, family: str) -> None:
    """A batch of 12 positions, and the same one padded to 48."""
    tokens = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for length in (12, 48):
        torch.manual_seed(0)
        if family == "bert":
            config = BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model: nn.Module = BertForSequenceClassification(config).double()
        else:
            model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).double()
        optimizer = hf_so2.build_optimizer(name, model)
        padded = nn.functional.pad(tokens, (0, length - 12))
        mask = (torch.arange(length) < 12).long().expand(4, -1)
        for _ in range(2):
            model(input_ids=padded, attention_mask=mask, labels=tokens[:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((captured_factors(optimizer), torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    for layer, factors in found[0][0].items():
        for key, value in factors.items():
            torch.testing.assert_close(found[1][0][layer][key], value, rtol=1e-6, atol=1e-10 * float(value.abs().max()))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.0, atol=1e-6)


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
