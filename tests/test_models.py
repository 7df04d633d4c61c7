"""Models from flags: seeds, overrides, widths, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hf_so2.data.tokenizer import corpus_tokenizer
from hf_so2.errors import ConfigurationError
from hf_so2.models import ModelArguments, build_config, build_model_and_config, parse_overrides, require_positions

SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=4"
LLAMA = SMALL + ",intermediate_size=64,num_key_value_heads=2"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    documents = Dataset.from_dict({"text": ["import this\n"]})
    return corpus_tokenizer(documents, 260, str(tmp_path_factory.mktemp("cache")))


def test_equal_seeds_give_equal_models(tokenizer: PreTrainedTokenizerFast) -> None:
    def parameters(seed: int) -> list[torch.Tensor]:
        model, config = build_model_and_config(ModelArguments(None, "llama", LLAMA), tokenizer, seed=seed)
        assert config.vocab_size == len(tokenizer)
        assert config.eos_token_id == tokenizer.eos_token_id
        return list(model.parameters())

    first, again, other = parameters(1), parameters(1), parameters(2)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    assert not all(torch.equal(left, right) for left, right in zip(first, other, strict=True))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "opt"])
def test_families_take_the_standard_names(model_type: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, config = build_model_and_config(ModelArguments(None, model_type, SMALL), tokenizer, seed=0)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_width_scales_the_whole_model(tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_config(ModelArguments(None, "llama", LLAMA, width=64), tokenizer)
    assert (config.hidden_size, config.intermediate_size) == (64, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 8)
    config = build_config(ModelArguments(None, "llama", LLAMA, width=64, head="size"), tokenizer)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)


def test_a_checkpoint_is_loaded_in_float32(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, _ = build_model_and_config(ModelArguments(None, "llama", LLAMA), tokenizer, seed=0)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded, config = build_model_and_config(ModelArguments(str(tmp_path), "llama"), tokenizer, seed=0)
    assert config.hidden_size == 32
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).float())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (None, {}),
        ("a=1,b = 2.5,c=silu,d=1e-5", {"a": 1, "b": 2.5, "c": "silu", "d": 1e-5}),
        ("a=true,b=False,c=None", {"a": True, "b": False, "c": None}),
        ('{"a": [1, 2], "b": {"c": 3}}', {"a": [1, 2], "b": {"c": 3}}),
        ({"a": 1, "b": "2e-2", "c": "silu"}, {"a": 1, "b": 0.02, "c": "silu"}),
    ],
)
def test_overrides_are_read_from_every_form(overrides: Any, expected: dict[str, Any]) -> None:
    assert parse_overrides(overrides) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "model_type=None: must be given"),
        ({"model_name_or_path": "x", "width": 64}, "width=64: must be left out"),
        ({"model_type": "llamma"}, r"model_type='llamma': .*did you mean 'llama'"),
        ({"model_type": "bert_japanese"}, "model_type='bert_japanese': must be a causal"),
        (
            {"model_type": "llama", "config_overrides": "hiden_size=3"},
            r"config_overrides='hiden_size': .*did you mean 'hidden_size'",
        ),
        (
            {"model_type": "llama", "config_overrides": "hidden_size"},
            "config_overrides='hidden_size': must read name=value",
        ),
        ({"model_type": "llama", "config_overrides": "{"}, "config_overrides='{': must be valid JSON"),
        ({"model_type": "llama", "config_overrides": "hidden_size=abc"}, "config_overrides=.*expected int, got str"),
        ({"model_type": "llama", "config_overrides": "hidden_size=130,num_attention_heads=4"}, "130"),
        (
            {"model_type": "gpt2", "config_overrides": "n_embd=130,n_head=4"},
            "hidden_size=130: must be a multiple of the 4",
        ),
        (
            {"model_type": "llama", "config_overrides": "num_attention_heads=4,num_key_value_heads=3,hidden_size=64"},
            "num_key_value_heads=3: must divide",
        ),
        ({"model_type": "llama", "config_overrides": LLAMA, "width": 65}, "width=65: "),
        (
            {"model_type": "llama", "config_overrides": LLAMA + ",vocab_size=9"},
            "must embed the tokenizer's 260 tokens, not only 9",
        ),
        ({"model_name_or_path": "nobody/nothing"}, "model_name_or_path='nobody/nothing': cannot be loaded"),
    ],
)
def test_what_makes_no_model_is_refused(
    given: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    def build() -> None:
        arguments = ModelArguments(**given)
        build_model_and_config(arguments, tokenizer, seed=0)

    with pytest.raises(ConfigurationError, match=message):
        build()


def test_blocks_must_fit_the_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_config(ModelArguments(None, "gpt2", SMALL + ",n_positions=64"), tokenizer)
    require_positions(config, 64)
    with pytest.raises(ConfigurationError, match="max_seq_length=65: must be at most the model's 64"):
        require_positions(config, 65)
