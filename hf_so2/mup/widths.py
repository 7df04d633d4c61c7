"""Which fields of a configuration are widths, and how to build a wider or narrower configuration of the same family.

Everything that is a width grows by one multiplier: the residual stream, the MLP, low-rank bottlenecks, and the number of heads
(or, on request, their size). Everything else stays: depth, vocabulary, experts, positions, SSM state, convolution kernels,
vision and audio towers. Fields a family derives from others (`head_dim=None`, `n_inner=None`) are left for it to derive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from hf_so2.errors import ConfigurationError

HeadGrowth: TypeAlias = Literal["count", "size"]
Path: TypeAlias = tuple[str, ...]

# Names as the families' own configuration classes spell them. A name means the same in every family that has it.
STREAM_FIELDS = frozenset(
    """hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size
    output_embedding_size pronunciation_embed_dim shape_embed_dim attention_hidden_size lru_width mamba_d_ssm
    intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dff dim_ff feed_forward_size
    moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size
    shared_experts_intermediate_size dense_intermediate_size intermediate_size_mlp expert_ffn_hidden_size
    q_lora_rank kv_lora_rank o_lora_rank time_step_rank mamba_dt_rank""".split()
)
# Heads of softmax attention: they multiply with head="count" and stay with head="size".
HEAD_COUNT_FIELDS = frozenset(
    """num_attention_heads num_key_value_heads n_head n_heads num_heads attention_heads decoder_attention_heads
    encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_kv_heads kv_n_heads
    swa_num_attention_heads swa_num_key_value_heads num_attention_heads_per_layer num_global_key_value_heads""".split()
)
# Heads of recurrent layers: their size is part of the recurrence's state, so they always grow in number.
RECURRENT_HEAD_FIELDS = frozenset(
    "mamba_n_heads mamba_num_heads linear_num_key_heads linear_num_value_heads linear_num_heads".split()
)
HEAD_SIZE_FIELDS = frozenset(
    """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim qk_head_dim d_head d_kv attention_head_dim attention_head_size
    kv_channels dim_head swa_head_dim global_head_dim rotary_dim""".split()
)
# Sub-configurations that belong to the language model; towers of other modalities keep their size.
NESTED_CONFIGS = frozenset("text_config decoder attn_config ffn_config".split())

_RECORD = "so2_mup"


def text_width(config: PretrainedConfig) -> int:
    """The hidden size of the language model that `config` describes.

    Raises:
        ConfigurationError: the configuration has no such field.
    """
    width = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(width, int) or width < 1:
        raise ConfigurationError("config", type(config).__name__, "must have a hidden_size (or a name for it in attribute_map)")
    return width


def width_fields(config: Mapping[str, Any], head: HeadGrowth = "count", path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yields `(path, value)` of every integer in `config.to_dict()` that grows with the width; list entries one by one."""
    growing = STREAM_FIELDS | RECURRENT_HEAD_FIELDS | (HEAD_COUNT_FIELDS if head == "count" else HEAD_SIZE_FIELDS)
    for name, value in config.items():
        if isinstance(value, Mapping):
            if name in NESTED_CONFIGS:
                yield from width_fields(value, head, (*path, name))
        elif name in growing:
            for index, entry in enumerate(value) if isinstance(value, (list, tuple)) else ((None, value),):
                if isinstance(entry, int) and not isinstance(entry, bool) and entry > 0:
                    yield (*path, name) if index is None else (*path, name, str(index)), entry


def rebuild(config: PretrainedConfig, values: Mapping[Path, int | float]) -> PretrainedConfig:
    """A new configuration of the same class with some fields replaced, built anew so that derived fields are derived again.

    Args:
        config: the configuration to start from; it is not changed.
        values: new values by path in `config.to_dict()`.

    Raises:
        ConfigurationError: the class rejects the new values.
    """
    fields = config.to_dict()
    for path, value in values.items():
        inner: Any = fields
        for key in path[:-1]:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        if isinstance(inner, list):
            inner[int(path[-1])] = value
        else:
            inner[path[-1]] = value
    fields.pop(_RECORD, None)
    try:
        new = type(config)(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        changed = ", ".join(f"{'.'.join(path)}={value}" for path, value in values.items())
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigurationError("config", type(config).__name__, f"rejects {changed}: {reason}") from error
    new._attn_implementation = config._attn_implementation
    return new


def scale_width(
    config: PretrainedConfig, width: int | None = None, *, multiplier: float | None = None, head: HeadGrowth = "count"
) -> PretrainedConfig:
    """A configuration of the same family, `multiplier` times as wide.

    Args:
        config: the base; it is not changed. Any muP record in it is left behind.
        width: the new hidden size; or
        multiplier: the ratio of the new hidden size to the old one. Exactly one of the two. Below 1 shrinks.
        head: `"count"` multiplies the number of attention heads (and KV heads) and keeps their size, `"size"` the other way
            round.

    Raises:
        ConfigurationError: the configuration has no width, or some width does not come out whole (the message names the
            nearest widths that do).
    """
    if (width is None) == (multiplier is None):
        raise ConfigurationError("width", width, "give exactly one of width and multiplier")
    if head not in ("count", "size"):
        raise ConfigurationError("head", head, "must be 'count' or 'size'")
    base = text_width(config)
    if width is not None:
        field, value, ratio = "width", width, Fraction(width, base)
    else:
        assert multiplier is not None
        field, value, ratio = "multiplier", multiplier, Fraction(multiplier).limit_denominator(base)
    if ratio <= 0:
        raise ConfigurationError(field, value, "must be positive")
    if ratio == 1:
        return rebuild(config, {})

    growing = dict(width_fields(config.to_dict(), head))
    divisor = math.gcd(*growing.values(), *_implied_head_sizes(config, head))
    if any((entry * ratio).denominator != 1 for entry in (divisor,)):
        unit = base // divisor
        below = int(base * ratio) // unit * unit
        nearest = " or ".join(str(option) for option in (below, below + unit) if option > 0)
        culprits = sorted({f"{path[-1]}={entry}" for path, entry in growing.items() if (entry * ratio).denominator != 1})
        raise ConfigurationError(
            field, value, f"the base ({', '.join(culprits) or 'its head size'}) does not divide; nearest widths are {nearest}"
        )
    return rebuild(config, {path: int(entry * ratio) for path, entry in growing.items()})


def _implied_head_sizes(config: PretrainedConfig, head: HeadGrowth) -> tuple[int, ...]:
    """Half the head size where it is derived from the width: rotary embeddings need it even."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if head == "count" or not isinstance(heads, int) or heads < 1:
        return ()
    size = text_width(config) // heads
    return (size // 2 if size % 2 == 0 else size,)
