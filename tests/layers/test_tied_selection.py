"""When a weight tied between embedding and head is preconditioned, and what the table says where it is not."""

from __future__ import annotations

from typing import Any

import pytest
from shared.helpers import BOTH_ENDS, VOCABULARY, gpt2, tied_llama
from torch import nn

import hf_so2


def reasons(
    model: nn.Module, name: str = "kfac", weight: str = "model.embed_tokens.weight", **settings: Any
) -> tuple[str, str]:
    report = hf_so2.build_optimizer(name, model, **settings).coverage()
    return next((entry.algorithm, entry.reason) for entry in report.parameters if entry.name == weight)


@pytest.mark.parametrize("setting", BOTH_ENDS)
def test_one_setting_alone_leaves_it_in_the_fallback(setting: str) -> None:
    why = "tied to the embedding: needs both precondition_embeddings and precondition_head"
    assert reasons(tied_llama(), **{setting: True}) == ("adamw", why)
    assert reasons(tied_llama()) == ("adamw", "tied to the embedding")


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_with_both_it_is_preconditioned(name: str) -> None:
    assert reasons(tied_llama(), name, **BOTH_ENDS) == (name, "weight of Embedding and Linear")
    assert reasons(gpt2(), name, "transformer.wte.weight", **BOTH_ENDS) == (name, "weight of Embedding and Linear")


def test_what_has_no_sum_to_invert_falls_back() -> None:
    common = "tied to the embedding: "
    expected = "without output factors, as in foof, its two ends have no common unit"
    assert reasons(tied_llama(), "foof", **BOTH_ENDS) == ("adamw", common + expected)
    expected = "its block is a sum, of which no power but the inverse is known"
    assert reasons(tied_llama(), exponent_a=0.5, **BOTH_ENDS) == ("adamw", common + expected)
    shared = tied_llama()
    shared.auxiliary = nn.Linear(16, VOCABULARY, bias=False)
    shared.auxiliary.weight = shared.lm_head.weight
    expected = "its modules are more than one token embedding and the Linear that is the output head"
    assert reasons(shared, **BOTH_ENDS) == ("adamw", common + expected)
    assert reasons(tied_llama(), skip_modules=["lm_head"], **BOTH_ENDS) == ("adamw", "skip_modules 'lm_head'")
