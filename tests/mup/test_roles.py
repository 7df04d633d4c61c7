"""Roles and ratios read off shapes, family by family, and what cannot be compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from hf_so2 import ConfigurationError, scale_width
from hf_so2.mup import ParameterWidth, infer_widths
from hf_so2.mup.roles import pattern_of
from hf_so2.mup.tiny import tiny_config

INPUT, HIDDEN, OUTPUT = ("input", 1.0, 4.0), ("hidden", 4.0, 4.0), ("output", 4.0, 1.0)
VECTOR, FIXED_VECTOR = ("vector", 1.0, 4.0), ("vector", 1.0, 1.0)

# What the families make special; everything not named is checked by its kind below. Base width 32, model width 128.
FAMILIES: dict[str, dict[str, tuple[str, float, float]]] = {
    "llama": {
        "model.embed_tokens.weight": INPUT,
        "model.layers.*.self_attn.k_proj.weight": HIDDEN,
        "model.layers.*.mlp.down_proj.weight": HIDDEN,
        "model.norm.weight": VECTOR,
        "lm_head.weight": OUTPUT,
    },
    # Conv1D stores (fan_in, fan_out); the embedding is also the head.
    "gpt2": {
        "transformer.wte.weight": INPUT,
        "transformer.wpe.weight": INPUT,
        "transformer.h.*.attn.c_attn.weight": HIDDEN,
        "transformer.h.*.attn.c_attn.bias": VECTOR,
        "transformer.h.*.mlp.c_proj.weight": HIDDEN,
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": INPUT,
        "gpt_neox.layers.*.attention.query_key_value.weight": HIDDEN,
        "lm_head.weight": OUTPUT,
    },
    # Norms of single heads do not grow with the number of heads.
    "qwen3": {"model.layers.*.self_attn.q_norm.weight": FIXED_VECTOR, "lm_head.weight": OUTPUT},
    "opt": {"model.decoder.embed_tokens.weight": INPUT, "model.decoder.layers.*.fc1.weight": HIDDEN},
    "gemma": {"model.embed_tokens.weight": INPUT, "model.layers.*.mlp.up_proj.weight": HIDDEN},
    # Experts are (expert, fan_out, fan_in); the router reads the stream and writes one number per expert.
    "mixtral": {
        "model.layers.*.mlp.experts.gate_up_proj": HIDDEN,
        "model.layers.*.mlp.experts.down_proj": HIDDEN,
        "model.layers.*.mlp.gate.weight": OUTPUT,
    },
    # Four query heads of 8 and one KV head: 32 + 2 * 8 rows become 128 + 2 * 8.
    "falcon": {"transformer.h.*.self_attention.query_key_value.weight": ("hidden", 4.0, 144 / 48)},
    "gpt_bigcode": {
        "transformer.h.*.attn.c_attn.weight": ("hidden", 4.0, 144 / 48),
        "transformer.h.*.attn.c_attn.bias": ("vector", 1.0, 144 / 48),
    },
    # dt_rank 2 and two states of 4 become 8 and 8; the convolution has one short kernel per channel.
    "mamba": {
        "backbone.layers.*.mixer.in_proj.weight": HIDDEN,
        "backbone.layers.*.mixer.x_proj.weight": ("hidden", 4.0, (8 * 4 + 8) / (8 + 8)),
        "backbone.layers.*.mixer.conv1d.weight": VECTOR,
        "backbone.layers.*.mixer.A_log": VECTOR,
        "backbone.layers.*.mixer.dt_proj.weight": HIDDEN,
    },
    # Gates of single heads: fan_in and fan_out stay, the heads multiply.
    "recurrent_gemma": {"model.layers.*.temporal_block.rg_lru.input_gate_weight": INPUT},
    "xlnet": {"transformer.layer.*.rel_attn.o": HIDDEN, "transformer.layer.*.rel_attn.r_w_bias": VECTOR},
    "gpt_oss": {"model.layers.*.mlp.experts.down_proj": HIDDEN, "model.layers.*.self_attn.sinks": VECTOR},
    "qwen2_moe": {"model.layers.*.mlp.shared_expert_gate.weight": OUTPUT},
    # The vision tower stays; its projector ends in the language model's width.
    "gemma3": {
        "model.multi_modal_projector.mm_input_projection_weight": INPUT,
        "model.vision_tower.encoder.layers.*.mlp.fc1.weight": ("scalar", 1.0, 1.0),
    },
}


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def by_pattern(widths: dict[str, ParameterWidth]) -> dict[str, tuple[str, float, float]]:
    return {pattern_of(name): (width.role, width.m_in, width.m_out) for name, width in widths.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    base = tiny_config(family)
    model = on_meta(scale_width(base, multiplier=4))
    widths = infer_widths(model, base)
    assert widths.keys() == dict(model.named_parameters()).keys()
    found = by_pattern(widths)
    for pattern, expected in FAMILIES[family].items():
        assert found[pattern] == pytest.approx(expected), pattern


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_base_width_roles_stay_and_every_ratio_is_one(family: str) -> None:
    base = tiny_config(family)
    widths = infer_widths(on_meta(base), base)
    wide = infer_widths(on_meta(scale_width(base, multiplier=4)), base)
    assert {name: width.role for name, width in widths.items()} == {name: width.role for name, width in wide.items()}
    ratios = {(width.m_in, width.m_out, width.scale_in, width.scale_out) for width in widths.values()}
    assert ratios == {(1.0, 1.0, 1.0, 1.0)}


def test_tied_matrices_keep_the_input_role() -> None:
    widths = infer_widths(on_meta(scale_width(tiny_config("gpt2"), multiplier=4)), tiny_config("gpt2"))
    assert [name for name, width in widths.items() if width.tied] == ["transformer.wte.weight"]
    assert widths["transformer.wte.weight"].role == "input"
    assert not any(width.tied for width in infer_widths(on_meta(tiny_config("llama")), tiny_config("llama")).values())


def test_depth_may_differ() -> None:
    base = tiny_config("llama")
    deep = scale_width(base, multiplier=4)
    deep.num_hidden_layers = 5
    widths = infer_widths(on_meta(deep), base)
    assert widths["model.layers.4.mlp.up_proj.weight"] == widths["model.layers.0.mlp.up_proj.weight"]
    shallow = infer_widths(
        on_meta(scale_width(base, multiplier=4)), type(base)(**{**base.to_dict(), "num_hidden_layers": 5})
    )
    assert shallow["model.layers.1.mlp.up_proj.weight"].m_in == 4.0


def test_what_no_width_moves_is_no_width() -> None:
    base = tiny_config("mixtral")
    fields = scale_width(base, multiplier=2).to_dict() | {"vocab_size": 300, "num_local_experts": 8}
    widths = infer_widths(on_meta(type(base)(**fields)), base)
    found = by_pattern(widths)
    assert found["model.embed_tokens.weight"] == ("input", 1.0, 2.0)
    assert found["lm_head.weight"] == ("output", 2.0, 1.0)
    assert found["model.layers.*.mlp.gate.weight"] == ("output", 2.0, 1.0)
    assert found["model.layers.*.mlp.experts.down_proj"] == ("hidden", 2.0, 2.0)


def test_larger_heads_are_widths_too() -> None:
    base = tiny_config("qwen3")
    found = by_pattern(infer_widths(on_meta(scale_width(base, multiplier=4, head="size")), base))
    assert found["model.layers.*.self_attn.q_norm.weight"] == VECTOR
    assert found["model.layers.*.self_attn.q_proj.weight"] == HIDDEN


def test_dimensions_may_grow_apart() -> None:
    base = tiny_config("llama")
    config = type(base)(**{**base.to_dict(), "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 64})
    found = by_pattern(infer_widths(on_meta(config), base))
    assert found["model.layers.*.mlp.down_proj.weight"] == ("hidden", 1.0, 2.0)
    assert found["model.layers.*.self_attn.k_proj.weight"] == ("hidden", 2.0, 1.0)


class Plain(nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 11, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))


def test_plain_modules() -> None:
    widths = infer_widths(Plain(32, depth=3), Plain(8))
    assert by_pattern(widths) == {
        "embedding.weight": INPUT,
        "blocks.*.weight": HIDDEN,
        "blocks.*.bias": VECTOR,
        "head.weight": OUTPUT,
        "temperature": ("scalar", 1.0, 1.0),
    }


def test_nothing_is_drawn_and_nothing_is_written() -> None:
    base = tiny_config("llama")
    model = AutoModelForCausalLM.from_config(scale_width(base, multiplier=2))
    before, fields = {name: p.clone() for name, p in model.named_parameters()}, base.to_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    infer_widths(model, base)
    assert torch.equal(torch.rand(3), expected)
    assert base.to_dict() == fields
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (GPT2Config(n_embd=32, n_head=4, n_layer=1), "base_config='gpt2': must be of the model's family, 'llama'"),
        (LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, tie_word_embeddings=True),
         "base_config='lm_head.weight': is a parameter of the model that the base model does not have"),
        (Plain(8), "base_config='model.embed_tokens.weight': is a parameter of the model that the base model"),
        ("llama", "base_config='llama': must be a transformers configuration or a module"),
    ],
    ids=["family", "tied", "module", "name"],
)  # fmt: skip
def test_what_cannot_be_compared(base: object, message: str) -> None:
    model = on_meta(scale_width(tiny_config("llama"), multiplier=2))
    with pytest.raises(ConfigurationError) as error:
        infer_widths(model, base)
    assert message in str(error.value)


def test_a_module_needs_a_module() -> None:
    with pytest.raises(ConfigurationError, match="needs a base module"):
        infer_widths(Plain(8), tiny_config("llama"))


def test_a_tied_base_is_not_the_base_of_an_untied_model() -> None:
    base = tiny_config("gpt2")
    untied = type(base)(**{**base.to_dict(), "tie_word_embeddings": False})
    with pytest.raises(ConfigurationError, match=r"lm_head.weight.*does not have"):
        infer_widths(on_meta(untied), base)
    with pytest.raises(ConfigurationError, match="tied to the head as it is in the model"):
        infer_widths(on_meta(base), untied)
