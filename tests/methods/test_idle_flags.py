"""A `precondition_…` flag with nothing in the model to precondition is refused; where there is something, it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shared.helpers import SMALL, gpt2, llama
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import hf_so2


def mlp(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3, bias=bias), nn.LayerNorm(3))


def frozen(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).requires_grad_(False)
    return model


def classifier() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3))


EMBEDDING = "a token embedding that is trained"
HEAD = r"an output head that get_output_embeddings\(\) names and that is trained"
BIAS = "a preconditioned weight with a bias that is trained"


@pytest.mark.parametrize(
    ("flag", "build", "needed"),
    [
        ("precondition_embeddings", mlp, EMBEDDING),
        ("precondition_embeddings", lambda: frozen(llama(), "model.embed_tokens"), EMBEDDING),
        ("precondition_head", mlp, HEAD),
        ("precondition_head", classifier, HEAD),
        ("precondition_head", lambda: frozen(llama(), "lm_head"), HEAD),
        ("precondition_biases", lambda: mlp(bias=False), BIAS),
        ("precondition_biases", llama, BIAS),
        ("precondition_biases", lambda: frozen(mlp(), "0"), BIAS),
    ],
)
def test_a_flag_without_an_object_is_refused(flag: str, build: Callable[[], nn.Module], needed: str) -> None:
    message = f"^{flag}=True: has no effect on this model; it needs {needed}$"
    with pytest.raises(hf_so2.ConfigurationError, match=message):
        hf_so2.build_optimizer("kfac", build(), **{flag: True})
    hf_so2.build_optimizer("kfac", build(), **{flag: False})


def test_what_is_there_but_left_out_has_a_reason_in_the_table_instead() -> None:
    """Tied, skipped or too large: the table says which, and some of these go with a change of another setting."""

    def reason(model: nn.Module, name: str, **settings: object) -> str:
        report = hf_so2.build_optimizer("kfac", model, **settings).coverage()
        return next(entry.reason for entry in report.parameters if entry.name == name)

    tied = "tied to the embedding: needs both precondition_embeddings and precondition_head"
    assert reason(gpt2(), "transformer.wte.weight", precondition_head=True) == tied
    skipped = {"skip_modules": ["lm_head"], "precondition_head": True}
    assert reason(llama(), "lm_head.weight", **skipped) == "skip_modules 'lm_head'"
    large = {"max_preconditioner_dim": 12, "precondition_head": True}
    assert reason(llama(), "lm_head.weight", **large) == "a dimension of 16 is above max_preconditioner_dim 12"
