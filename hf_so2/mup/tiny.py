"""A very small configuration of any family in transformers, for tests and for the coverage table.

The sizes are chosen so that every kind of layer a family has occurs once or twice and the width doubles and quadruples
freely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .widths import DEPTH_FIELDS, STAGE_DEPTH_FIELDS

VOCABULARY = 128

_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "pronunciation_vocab_size", "shape_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("vocab_size_per_layer_input", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128
    ),
    **dict.fromkeys(
        ("max_target_positions", "max_source_positions", "context_length", "encoder_hash_byte_group_vocab"), 128
    ),
    **dict.fromkeys(
        """hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim output_embedding_size
        attention_hidden_size lru_width pronunciation_embed_dim shape_embed_dim adapter_in_dim adapter_out_dim
        adapter_input_size""".split(),
        32,
    ),
    **dict.fromkeys(
        """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dff dim_ff
        feed_forward_size mamba_d_ssm""".split(),
        64,
    ),
    **dict.fromkeys(
        """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank
        shared_intermediate_size shared_experts_intermediate_size dense_intermediate_size intermediate_size_mlp
        expert_ffn_hidden_size input_embedding_size ple_embed_dim router_hidden_size hc_lowrank""".split(),
        16,
    ),
    **dict.fromkeys("kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank time_step_rank".split(), 8),
    **dict.fromkeys(
        """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads
        num_attention_heads_per_layer""".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads".split(), 2
    ),
    **dict.fromkeys("linear_num_value_heads linear_num_heads".split(), 4),
    **dict.fromkeys(
        """head_dim v_head_dim d_head attention_head_dim attention_head_size kv_channels dim_head swa_head_dim
        global_head_dim mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        index_head_dim""".split(),
        8,
    ),
    **dict.fromkeys("qk_nope_head_dim qk_rope_head_dim".split(), 8),
    **dict.fromkeys("d_ff dim hidden_dim".split(), 64),
    **dict.fromkeys(
        """d_latents output_hidden_size pooler_hidden_size pooler_output_size prediction_head_size decoder_hidden_size
        classifier_proj_size""".split(),
        32,
    ),
    **dict.fromkeys("true_hidden_size intra_bottleneck_size conv_dim embedding_rank".split(), 16),
    **dict.fromkeys("entity_vocab_size tdnn_dim".split(), 128),
    **dict.fromkeys("embed_dim".split(), 24),
    **dict.fromkeys(
        """encoder_num_attention_heads decoder_num_attention_heads encoder_num_key_value_heads
        decoder_num_key_value_heads speech_encoder_attention_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads num_self_attention_heads num_cross_attention_heads""".split(),
        4,
    ),
    "d_kv": 8,
    **dict.fromkeys("speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim".split(), 64),
    "coordinate_size": 4,
    "shape_size": 8,
    "num_self_attends_per_block": 2,
    "qk_head_dim": 16,
    "rotary_dim": 4,
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk num_experts_per_token moe_k zero_expert_num".split(), 2),
    **dict.fromkeys("n_group topk_group num_expert_group n_groups mamba_n_groups".split(), 1),
    **dict.fromkeys("state_size mamba_d_state ssm_state_size".split(), 4),
    **dict.fromkeys("chunk_size mamba_chunk_size block_size sliding_window index_topk".split(), 16),
}
_DEPTH = 2
_IMAGE = 64
# Lists by stage of a vision model, as wide as this at first.
_STAGE_WIDTHS = frozenset("hidden_sizes embed_dim embed_dims".split())
_FIRST_STAGE = 16

# What the general rules cannot know: validators that tie fields together, periods of hybrid layers, fields that are
# None.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16]},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dots3_note_text": {"head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "bit": {"num_groups": 4},
    "swin": {"image_size": 128, "window_size": 4},
    "donut-swin": {"image_size": 128, "window_size": 4},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 32, 64],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 64, 128],
    },
    "textnet": {"stem_out_channels": 16, "image_size": [64, 64]},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "cvt": {"depth": [1, 2, 3]},
    "distilbert": {"dim": 32},
    "mobilebert": {"embedding_size": 16},
    "lilt": {"hidden_size": 48},
    "neomme": {"head_dim": 16},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "llama": {"num_key_value_heads": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "lfm2": {"block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "ffn_round_up_to_multiple_of": 8},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0, "altup_num_inputs": 2},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A configuration of about a hundred thousand parameters.

    Args:
        model_type: key of `transformers.CONFIG_MAPPING`.
        overrides: fields to set on top, for instance `hidden_size=64`.
    """
    config_class = CONFIG_MAPPING[model_type]
    try:
        defaults = config_class().to_dict()
    except ValueError:
        defaults = {}
    # What is no declared field was derived from one, and must be derived again.
    declared = {field.name for field in dataclasses.fields(config_class)} | {"per_layer_config"}
    defaults = {name: value for name, value in defaults.items() if name in declared}
    small = _shrink(defaults)
    if isinstance(small.get("image_size"), int):
        small["image_size"] = min(small["image_size"], _IMAGE)
    if small.get("vocab_size", VOCABULARY) is None:
        small["vocab_size"] = VOCABULARY
    fields = small | _OVERRIDES.get(model_type, {}) | overrides
    for name, nested in fields.items():
        if isinstance(nested, Mapping) and nested.get("model_type") in _OVERRIDES:
            fields[name] = {**nested, **_OVERRIDES[nested["model_type"]]}
    return config_class(**fields)


def _shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    depth = max((fields[name] for name in DEPTH_FIELDS if isinstance(fields.get(name), int)), default=0)
    keep = _one_layer_of_each_kind(fields, depth)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config":
            by_layer = {int(layer): overrides for layer, overrides in value.items()}
            small[name] = {new: _shrink(by_layer[old]) for new, old in enumerate(keep) if old in by_layer}
            continue
        if isinstance(value, Mapping):
            small[name] = (
                _shrink(value) if name.endswith("config") or name in ("encoder", "decoder", "text_encoder") else value
            )
        elif isinstance(value, (list, tuple)) and depth > 0 and len(value) == depth:
            small[name] = [_clip(name, value[index]) for index in keep]
        elif isinstance(value, bool) or not isinstance(value, int):
            small[name] = _clip(name, value) if isinstance(value, (list, tuple)) else value
        elif name in DEPTH_FIELDS:
            small[name] = len(keep) if value == depth else min(value, _DEPTH)
        elif name.endswith(("_token_id", "_token_index")):
            small[name] = value % VOCABULARY
        else:
            small[name] = _clip(name, value)
    # Latent attention and other families demand one KV head per head: keep the default's ratio where it is 1.
    if fields.get("num_key_value_heads") and fields["num_key_value_heads"] == fields.get("num_attention_heads"):
        small["num_key_value_heads"] = small.get("num_attention_heads")
    return small


def _clip(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        if name in STAGE_DEPTH_FIELDS:
            return type(value)(min(entry, _DEPTH) for entry in value)
        if name in _STAGE_WIDTHS and value[0] > _FIRST_STAGE:
            return type(value)(max(entry * _FIRST_STAGE // value[0] // 4, 1) * 4 for entry in value)
        if name in ("conv_dim", "tdnn_dim"):
            return type(value)(min(entry, _SIZES[name]) for entry in value)
    return min(value, _SIZES[name]) if name in _SIZES and isinstance(value, int) else value


def _one_layer_of_each_kind(fields: Mapping[str, Any], depth: int) -> Sequence[int]:
    per_layer = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == depth]
    first: dict[str, int] = {}
    for index in range(depth):
        first.setdefault(repr([entries[index] for entries in per_layer]), index)
    keep = sorted(first.values())
    return keep if len(keep) >= _DEPTH else list(range(min(depth, _DEPTH)))
