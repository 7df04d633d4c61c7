"""`scale_width`: every width grows by the same factor, nothing else changes, and what cannot be is refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    Zamba2Config,
)

from hf_so2 import ConfigurationError, scale_width
from hf_so2.mup.tiny import tiny_config
from hf_so2.mup.widths import declared_fields, text_width, width_fields


@given(
    heads_per_group=st.integers(1, 4),
    groups=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8, 16]),
    mlp=st.integers(1, 12),
    multiplier=st.integers(1, 6),
    head=st.sampled_from(["count", "size"]),
)
def test_llama_grows_in_width_alone(
    heads_per_group: int, groups: int, head_dim: int, mlp: int, multiplier: int, head: str
) -> None:
    heads = heads_per_group * groups
    base = LlamaConfig(
        vocab_size=50,
        hidden_size=heads * head_dim,
        intermediate_size=mlp * heads,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=3,
    )
    scaled = scale_width(base, multiplier=multiplier, head=head)
    more, larger = (multiplier, 1) if head == "count" else (1, multiplier)
    expected = base.to_dict() | {
        "hidden_size": multiplier * base.hidden_size,
        "intermediate_size": multiplier * base.intermediate_size,
        "num_attention_heads": more * heads,
        "num_key_value_heads": more * groups,
        "head_dim": larger * head_dim,
    }
    assert scaled.to_dict() == expected
    assert scale_width(scaled, width=base.hidden_size, head=head).to_dict() == base.to_dict()


@given(heads=st.integers(1, 12), mlp=st.integers(1, 400), width=st.integers(1, 2000))
def test_a_refused_width_names_the_nearest_possible_ones(heads: int, mlp: int, width: int) -> None:
    base = LlamaConfig(
        hidden_size=16 * heads, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=heads
    )
    try:
        scaled = scale_width(base, width=width)
    except ConfigurationError as error:
        named = [int(number) for number in re.findall(r"\d+", str(error).partition("nearest: ")[2])]
        assert named
        assert min(named) < width < max(named) or named == [max(named)]
        for possible in named:
            assert scale_width(base, width=possible).hidden_size == possible
    else:
        assert scaled.hidden_size == width
        assert scaled.intermediate_size * base.hidden_size == base.intermediate_size * width


FAMILIES = [
    (GPT2Config(n_embd=32, n_head=4), {"n_embd": 64, "n_head": 8, "n_inner": None, "n_positions": 1024}),
    (
        OPTConfig(hidden_size=32, ffn_dim=96, num_attention_heads=4, word_embed_proj_dim=16),
        {"hidden_size": 64, "ffn_dim": 192, "num_attention_heads": 8, "word_embed_proj_dim": 32},
    ),
    (
        FalconConfig(hidden_size=32, num_attention_heads=4),
        {"hidden_size": 64, "num_attention_heads": 8, "multi_query": True},
    ),
    (
        BartConfig(d_model=32, decoder_attention_heads=4),
        {"d_model": 64, "decoder_attention_heads": 8, "encoder_layers": 12},
    ),
    (
        MambaConfig(hidden_size=64),
        {"hidden_size": 128, "intermediate_size": 256, "time_step_rank": 8, "state_size": 16},
    ),
    (
        Mamba2Config(hidden_size=64, num_heads=8, head_dim=16),
        {"num_heads": 16, "head_dim": 16, "state_size": 128},
    ),
    (
        Qwen3NextConfig(),
        {"linear_num_key_heads": 32, "linear_key_head_dim": 128, "head_dim": 256, "num_experts": 512},
    ),
    (
        DeepseekV3Config(),
        {"kv_lora_rank": 1024, "num_attention_heads": 256, "qk_rope_head_dim": 64, "head_dim": 64},
    ),
]


@pytest.mark.parametrize(("config", "expected"), FAMILIES, ids=[type(config).__name__ for config, _ in FAMILIES])
def test_families_grow_in_their_own_fields(config: PretrainedConfig, expected: dict[str, object]) -> None:
    scaled = scale_width(config, multiplier=2).to_dict()
    assert {name: scaled[name] for name in expected} == expected


def test_derived_fields_are_derived_again() -> None:
    # Zamba2 computes these from hidden_size without declaring them; a copied value would stay behind.
    scaled = scale_width(Zamba2Config(), multiplier=2)
    assert (scaled.attention_hidden_size, scaled.attention_head_dim) == (10240, 160)
    assert scaled.mamba_headdim == 2 * scaled.hidden_size // scaled.n_mamba_heads


def test_nested_configurations() -> None:
    base = Gemma3Config()
    scaled = scale_width(base, multiplier=2)
    assert scaled.text_config.hidden_size == 2 * base.text_config.hidden_size
    assert scaled.text_config.num_attention_heads == 2 * base.text_config.num_attention_heads
    assert scaled.vision_config.to_dict() == base.vision_config.to_dict()


def test_overrides_of_single_layers() -> None:
    scaled = declared_fields(scale_width(Gemma4TextConfig(), multiplier=2, head="size"))
    assert {overrides["head_dim"] for overrides in scaled["per_layer_config"].values()} == {2 * 512}


def test_byte_latent_transformers_grow_in_all_their_parts() -> None:
    base = tiny_config("blt")
    scaled = scale_width(base, multiplier=2)
    assert text_width(scaled) == 2 * text_width(base)
    for part in ("encoder_config", "decoder_config", "global_config"):
        assert getattr(scaled, part).hidden_size == 2 * getattr(base, part).hidden_size


def test_the_base_is_left_alone_and_its_record_behind() -> None:
    base = LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    base.so2_mup = {"width": 64}
    before = base.to_dict()
    scaled = scale_width(base, multiplier=2)
    assert base.to_dict() == before
    assert not hasattr(scaled, "so2_mup")
    assert not hasattr(scale_width(base, multiplier=1), "so2_mup")


MULTIPLE = "hidden size must be a multiple of 16 (nearest: {}) to divide into heads"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 100}, "width=100: " + MULTIPLE.format("96 or 112")),
        ({"width": 7}, "width=7: " + MULTIPLE.format("16")),
        ({"multiplier": 1.1}, "multiplier=1.1: " + MULTIPLE.format("64 or 80")),
        ({"width": 0}, "width=0: must be a positive number"),
        ({"width": True}, "width=True: must be a positive number"),
        ({"multiplier": float("nan")}, "multiplier=nan: must be a positive number"),
        ({}, "width=None: give exactly one of width and multiplier"),
        ({"width": 64, "multiplier": 1}, "width=64: give exactly one of width and multiplier"),
        ({"width": 64, "head": "both"}, "head='both': must be 'count' or 'size'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    base = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128)
    with pytest.raises(ConfigurationError) as error:
        scale_width(base, **arguments)
    assert str(error.value) == message


def test_a_configuration_without_width() -> None:
    with pytest.raises(ConfigurationError, match=r"PreTrainedConfig.*must have hidden_size"):
        scale_width(PretrainedConfig(), multiplier=2)


def test_a_class_that_rejects_the_result() -> None:
    class Narrow(LlamaConfig):
        def __post_init__(self, **kwargs: object) -> None:
            super().__post_init__(**kwargs)
            if self.hidden_size > 64:
                raise ValueError("a narrow model stays narrow")

    base = Narrow(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    with pytest.raises(ConfigurationError, match=r"^config='Narrow': rejects these widths: .*stays narrow"):
        scale_width(base, multiplier=2)


def test_width_fields_reads_lists_and_skips_what_is_derived() -> None:
    fields = {
        "hidden_size": 8,
        "n_inner": None,
        "num_attention_heads_per_layer": [2, 4],
        "vocab_size": 9,
        "head_dim": 0,
    }
    assert dict(width_fields(fields)) == {
        ("hidden_size",): 8,
        ("num_attention_heads_per_layer", 0): 2,
        ("num_attention_heads_per_layer", 1): 4,
    }
