"""Which fields of a configuration are widths, and how to build a wider or narrower configuration of the same family.

Everything that is a width grows by one multiplier: the residual stream, the MLP, low-rank bottlenecks, and the number
of heads (or, on request, their size). Everything else stays: depth, vocabulary, labels, experts, positions, SSM state,
convolution kernels, the convolutions that read a waveform, and vision and audio towers of a language model. Fields a
family derives from others (`head_dim=None`, `n_inner=None`) are left for it to derive.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from hf_so2.errors import ConfigurationError

HeadGrowth: TypeAlias = Literal["count", "size"]
Path: TypeAlias = tuple[str | int, ...]

# What the code of a family raises where it has not thought of a value in its config.
REFUSALS = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

RECORD_FIELD = "so2_mup"
"""Name of the configuration field that records what `apply_mup` did."""

# Names as the families' own configuration classes spell them. A name means the same in every family that has it.
STREAM_FIELDS = frozenset(
    """hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size
    output_embedding_size pronunciation_embed_dim shape_embed_dim hidden_size_global encoder_cross_output_size
    attention_hidden_size lru_width mamba_d_ssm axial_pos_embds_dim backbone_hidden_size
    intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dff dim_ff
    feed_forward_size moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
    shared_intermediate_size shared_experts_intermediate_size dense_intermediate_size intermediate_size_mlp
    expert_ffn_hidden_size prompt_mid_dim q_lora_rank kv_lora_rank o_lora_rank laurel_rank adapter_rank hc_lowrank
    gated_norm_rank moe_latent_size hidden_size_per_layer_input ple_embed_dim time_step_rank mamba_dt_rank
    d_ff dim hidden_dim d_latents embed_dim embed_dims hidden_sizes neck_hidden_sizes base_attn_unit_dims
    stem_channels stem_out_channels stage_in_channels stage_mid_channels stage_out_channels true_hidden_size
    intra_bottleneck_size decoder_hidden_size output_hidden_size pooler_hidden_size pooler_output_size
    prediction_head_size classifier_proj_size embedding_rank coordinate_size shape_size speech_encoder_intermediate_size
    t2u_encoder_ffn_dim t2u_decoder_ffn_dim""".split()
)
# Heads of softmax attention: they multiply with head="count" and stay with head="size".
HEAD_COUNT_FIELDS = frozenset(
    """num_attention_heads num_key_value_heads n_head n_heads num_heads attention_heads decoder_attention_heads
    encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_kv_heads kv_n_heads
    swa_num_attention_heads swa_num_key_value_heads num_attention_heads_per_layer num_global_key_value_heads
    index_n_heads indexer_n_heads encoder_num_attention_heads decoder_num_attention_heads encoder_num_key_value_heads
    decoder_num_key_value_heads speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads
    num_self_attention_heads num_cross_attention_heads""".split()
)
_HEAD_NUMBERS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
# Heads of recurrent layers: their size is part of the recurrence's state, so they always grow in number.
RECURRENT_HEAD_FIELDS = frozenset(
    "mamba_n_heads mamba_num_heads linear_num_key_heads linear_num_value_heads linear_num_heads".split()
)
HEAD_SIZE_FIELDS = frozenset(
    """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim qk_head_dim d_head d_kv attention_head_dim
    attention_head_size kv_channels dim_head swa_head_dim swa_v_head_dim global_head_dim rotary_dim index_head_dim
    indexer_head_dim key_dim""".split()
)
# Sub-configurations of the language model, scaled throughout. Towers of other modalities keep their size, except where
# they project into the language model's width.
LANGUAGE_CONFIGS = frozenset(
    """text_config encoder decoder attn_config ffn_config depth_decoder_config encoder_config decoder_config
    global_config patcher_config""".split()
)
TOWER_CONFIGS = frozenset("vision_config audio_config".split())
TOWER_OUTPUT_FIELDS = frozenset("adapter_out_dim out_hidden_size".split())
PER_LAYER_CONFIG = "per_layer_config"
DEPTH_FIELDS = frozenset(
    """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers
    num_blocks num_layers_per_stack encoder_num_hidden_layers decoder_num_hidden_layers speech_encoder_layers
    t2u_encoder_layers t2u_decoder_layers l_layers r_layers x_layers""".split()
)
# By stage, in vision.
STAGE_DEPTH_FIELDS = frozenset("depths depth stage_num_blocks n_attn_blocks".split())
# Where a configuration says its width, in the order in which they are asked; of several stages the last.
_WIDTHS = ("hidden_size", "d_model", "hidden_sizes", "embed_dim", "embed_dims")


def text_width(config: PretrainedConfig) -> int:
    """The hidden size of the language model that `config` describes, or of a model of images or speech.

    Where stages of a vision model differ in it, it is that of the last.

    Raises:
        ConfigurationError: the configuration has no such field.
    """
    text = config.get_text_config(decoder=True)
    # A byte-latent transformer has no width of its own: its global model holds the stream; of others an encoder does.
    holders = [getattr(text, "global_config", text), getattr(text, "encoder_config", None)]
    for value in (getattr(holder, name, None) for holder in holders for name in _WIDTHS):
        width = value[-1] if isinstance(value, (list, tuple)) and value else value
        if isinstance(width, int) and width > 0:
            return width
    raise ConfigurationError(
        "config", type(config).__name__, "must have hidden_size, or another name for it in attribute_map"
    )


def require_config(name: str, value: object) -> None:
    """Refuses what is no configuration; a model is often handed over in its place.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(value, PretrainedConfig):
        raise ConfigurationError(
            name, type(value).__name__, "must be a transformers configuration, such as model.config"
        )


def scale_width(
    config: PretrainedConfig, width: int | None = None, *, multiplier: float | None = None, head: HeadGrowth = "count"
) -> PretrainedConfig:
    """A configuration of the same family, `multiplier` times as wide.

    Args:
        config: the base; it is not changed. A muP record in it is left behind.
        width: the new hidden size; or
        multiplier: the ratio of the new hidden size to the old one. Exactly one of the two. Below 1 shrinks.
        head: `"count"` multiplies the number of attention heads and KV heads and keeps their size, `"size"` the other
            way round.

    Raises:
        ConfigurationError: the configuration has no width, or some width does not come out whole (the message names the
            nearest widths that do), or the class rejects the result.
    """
    require_config("config", config)
    if head not in ("count", "size"):
        raise ConfigurationError("head", head, "must be 'count' or 'size'")
    if (width is None) == (multiplier is None):
        raise ConfigurationError("width", width, "give exactly one of width and multiplier")
    base = text_width(config)
    field, value, target = (
        ("width", width, width) if width is not None else ("multiplier", multiplier, (multiplier or 0) * base)
    )
    if not isinstance(target, (int, float)) or isinstance(target, bool) or not 0 < target < math.inf:
        raise ConfigurationError(field, value, "must be a positive number")
    if target == base:
        return rebuild(config, {})

    growing = dict(width_fields(declared_fields(config), head))
    # Every width is a multiple of base/divisor exactly when all growing fields come out whole.
    divisor = math.gcd(*growing.values(), _implied_head_size(config, growing, head))
    unit = base // divisor
    if abs(target / unit - round(target / unit)) > 1e-6:
        below = int(target // unit) * unit
        nearest = " or ".join(str(option) for option in (below, below + unit) if option > 0)
        raise ConfigurationError(
            field, value, f"hidden size must be a multiple of {unit} (nearest: {nearest}) to divide into heads"
        )
    ratio = Fraction(round(target / unit) * unit, base)
    return rebuild(config, {path: int(entry * ratio) for path, entry in growing.items()})


def width_fields(fields: Mapping[Any, Any], head: HeadGrowth = "count", path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yields `(path, value)` of every integer in a configuration's dictionary that grows with the width."""
    growing = STREAM_FIELDS | RECURRENT_HEAD_FIELDS | (HEAD_COUNT_FIELDS if head == "count" else HEAD_SIZE_FIELDS)
    yield from _positive_integers(fields, growing, path)
    for name, value in fields.items():
        if not isinstance(value, Mapping):
            continue
        if name in LANGUAGE_CONFIGS and not _is_tower(name, fields):
            yield from width_fields(value, head, (*path, name))
        elif name == PER_LAYER_CONFIG:
            for layer, overrides in value.items():
                yield from _positive_integers(overrides, growing, (*path, name, layer))
        elif name in TOWER_CONFIGS:
            yield from _positive_integers(value, TOWER_OUTPUT_FIELDS, (*path, name))


def _is_tower(name: str, fields: Mapping[Any, Any]) -> bool:
    """Whether an encoder beside a language model is one of another modality."""
    return name == "encoder_config" and isinstance(fields.get("text_config"), Mapping)


def _positive_integers(fields: Mapping[str, Any], names: frozenset[str], path: Path) -> Iterator[tuple[Path, int]]:
    for name, value in fields.items():
        if name not in names:
            continue
        entries: list[tuple[Path, Any]] = [((*path, name), value)]
        if isinstance(value, (list, tuple)):
            entries = [((*path, name, index), entry) for index, entry in enumerate(value)]
            if name == "stem_channels":
                entries = entries[1:]  # the first are the image's
        for entry_path, entry in entries:
            # Zero, None and "auto" mean that the family has no such width or derives it.
            if isinstance(entry, int) and not isinstance(entry, bool) and entry > 0:
                yield entry_path, entry


def declared_fields(config: PretrainedConfig) -> dict[str, Any]:
    """`config.to_dict()` without what the class derives from other fields and would not derive again if it were
    passed."""
    fields = config.to_dict()
    fields.pop(RECORD_FIELD, None)
    for name in fields:
        nested = vars(config).get(name)
        if isinstance(nested, PretrainedConfig):
            fields[name] = declared_fields(nested)
    declared = {field.name for field in dataclasses.fields(config)} | {PER_LAYER_CONFIG}
    extra = {name: value for name, value in fields.items() if name not in declared}
    if any(isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool) for value in extra.values()):
        derived = _construct(
            type(config), {name: value for name, value in fields.items() if name in declared}
        ).to_dict()
        fields = {name: value for name, value in fields.items() if name not in extra or derived.get(name) != value}
    return fields


def rebuild(config: PretrainedConfig, values: Mapping[Path, Any]) -> PretrainedConfig:
    """A new configuration of the same class with some fields replaced, built anew so that derived fields are derived
    again.

    Args:
        config: the configuration to start from; it is not changed. A muP record in it is left behind.
        values: new values by path in `declared_fields(config)`.

    Raises:
        ConfigurationError: the class rejects the new values.
    """
    fields = declared_fields(config)
    for path, value in values.items():
        inner: Any = fields
        for step, following in itertools.pairwise(path):
            if isinstance(inner[step], tuple) and isinstance(following, int):
                inner[step] = list(inner[step])
            inner = inner[step]
        inner[path[-1]] = value
    new = _construct(type(config), fields)
    _copy_attention(config, new)
    return new


def _copy_attention(old: PretrainedConfig, new: PretrainedConfig) -> None:
    """Parts of a composite may each have another implementation, and setting the whole's sets theirs."""
    new._attn_implementation = old._attn_implementation
    for name, part in vars(old).items():
        if isinstance(part, PretrainedConfig) and isinstance(own := vars(new).get(name), PretrainedConfig):
            _copy_attention(part, own)


def _construct(config_class: type[PretrainedConfig], fields: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return config_class(**fields)
    except REFUSALS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ConfigurationError("config", config_class.__name__, f"rejects these widths: {reason}") from error


def head_sizes(config: PretrainedConfig) -> dict[Path, int]:
    """The sizes of attention heads by field; where the class derives them, the quotient of width and number of
    heads."""
    fields = declared_fields(config)
    growing = width_fields(fields, "size")
    sizes = {path: size for path, size in growing if path[-1] in HEAD_SIZE_FIELDS}
    text = config.get_text_config(decoder=True).to_dict()
    heads = next((text[name] for name in _HEAD_NUMBERS if isinstance(text.get(name), int) and text[name] > 0), 0)
    if not sizes and heads:
        sizes[("hidden_size", "/", "num_attention_heads")] = text_width(config) // heads
    return sizes


def _implied_head_size(config: PretrainedConfig, growing: Mapping[Path, int], head: HeadGrowth) -> int:
    """Half the head size where the class derives it from the width (rotary embeddings need it even), else 0."""
    if head == "count" or any(path[-1] in HEAD_SIZE_FIELDS for path in growing):
        return 0
    size = next(iter(head_sizes(config).values()), 0)
    return size // 2 if size % 2 == 0 else size
