"""How to build a deeper or shallower configuration of the same family, and how much deeper one is than another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from hf_so2.errors import ConfigurationError
from hf_so2.mup.widths import (
    DEPTH_FIELDS,
    HEAD_COUNT_FIELDS,
    HEAD_SIZE_FIELDS,
    LANGUAGE_CONFIGS,
    PER_LAYER_CONFIG,
    RECURRENT_HEAD_FIELDS,
    STREAM_FIELDS,
    Path,
    declared_fields,
    rebuild,
    require_config,
)

_INDEX_LISTS = frozenset("attn_layer_indices cross_attention_layers moe_layers full_attn_idxs hybrid_layer_ids".split())
_WIDTHS = STREAM_FIELDS | HEAD_COUNT_FIELDS | HEAD_SIZE_FIELDS | RECURRENT_HEAD_FIELDS


def depths_of(fields: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yields `(path, value)` of every number of layers of the language model in a configuration's dictionary."""
    for name, value in fields.items():
        if name in DEPTH_FIELDS and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield (*path, name), value
        elif name in LANGUAGE_CONFIGS and isinstance(value, Mapping):
            yield from depths_of(value, (*path, name))


def text_depth(config: PretrainedConfig) -> int:
    """The number of layers of the language model that `config` describes.

    Raises:
        ConfigurationError: the configuration has no such field.
    """
    text = config.get_text_config(decoder=True)
    found = getattr(text, "num_hidden_layers", None)
    depth = found if isinstance(found, int) else max(dict(depths_of(text.to_dict())).values(), default=0)
    if depth < 1:
        raise ConfigurationError("config", type(config).__name__, "must have a number of layers")
    return depth


def depth_growth(base: PretrainedConfig, config: PretrainedConfig) -> float:
    """How many times as deep as `base` a model of `config`, of the same family, is; exactly 1.0 for equal depths.

    Raises:
        ConfigurationError: parts of the model grow by different factors.
    """
    own, of_base = (dict(depths_of(declared_fields(c))) for c in (config, base))
    pairs = {path[-1]: (of_base[path], own[path]) for path in own.keys() & of_base.keys()}
    if not pairs and any(hasattr(c.get_text_config(decoder=True), "num_hidden_layers") for c in (base, config)):
        pairs = {"num_hidden_layers": (text_depth(base), text_depth(config))}  # counted from a list of layers
    growing = {after / before for before, after in pairs.values()} - {1.0}
    if len(growing) > 1:
        found = ", ".join(f"{name} {before} to {after}" for name, (before, after) in sorted(pairs.items()))
        raise ConfigurationError("base_config", found, "must have its numbers of layers in one ratio to the model's")
    return growing.pop() if growing else 1.0


def scale_depth(
    config: PretrainedConfig, depth: int | None = None, *, multiplier: float | None = None
) -> PretrainedConfig:
    """A configuration of the same family, `multiplier` times as deep. Its sibling is `scale_width`.

    Lists with an entry for every layer, such as the kinds of layers of a hybrid, are repeated, or end earlier.

    Args:
        config: the base; it is not changed. A muP record in it is left behind.
        depth: the new number of layers; or
        multiplier: the ratio of the new number of layers to the old one. Exactly one of the two. Below 1 shrinks.

    Raises:
        ConfigurationError: the configuration has no number of layers, or one does not come out whole, or the class
            rejects the result.
    """
    require_config("config", config)
    if (depth is None) == (multiplier is None):
        raise ConfigurationError("depth", depth, "give exactly one of depth and multiplier")
    base = text_depth(config)
    field, value = ("depth", depth) if depth is not None else ("multiplier", multiplier)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigurationError(field, value, "must be a positive number")
    target = value if depth is not None else value * base
    fields = declared_fields(config)
    values: dict[Path, Any] = {}
    for path, layers in depths_of(fields):
        new = layers * target / base
        if abs(new - round(new)) > 1e-6 or round(new) < 1:
            allowed = f"must give a whole number of layers, and {path[-1]} of {layers} would become {new:g}"
            raise ConfigurationError(field, value, allowed)
        values[path] = round(new)
    if target == base:
        return rebuild(config, {})
    for path in list(values) or [("num_hidden_layers",)]:
        holder = path[:-1]
        before, after = (fields_at(fields, path), values[path]) if path in values else (base, round(target))
        values |= _lists(holder, fields_at(fields, holder), before, after)
    new_config = rebuild(config, values)
    if text_depth(new_config) != target:
        allowed = f"cannot be had: {type(config).__name__} has {text_depth(new_config)} layers by its other fields"
        raise ConfigurationError(field, value, allowed)
    return new_config


def fields_at(fields: Mapping[Any, Any], path: Path) -> Any:
    inner: Any = fields
    for step in path:
        inner = inner[step]
    return inner


def _lists(holder: Path, fields: Mapping[str, Any], old: int, new: int) -> dict[Path, Any]:
    """What has one entry for each of `old` layers, for `new` layers."""
    values: dict[Path, Any] = {}
    for name, value in fields.items():
        if name == PER_LAYER_CONFIG and isinstance(value, Mapping):
            by_layer = {int(layer): overrides for layer, overrides in value.items()}
            values[*holder, name] = {i: by_layer[i % old] for i in range(new) if i % old in by_layer}
        elif name == "attention_types" and isinstance(value, (list, tuple)):  # GPT-Neo: [[kinds, how often], ...]
            total = sum(len(kinds) * count for kinds, count in value)
            if total == old and all((count * new) % old == 0 for _, count in value):
                values[*holder, name] = [[kinds, count * new // old] for kinds, count in value]
        elif (indices := _indices(name, value, old, new)) is not None:
            values[*holder, name] = indices
        elif isinstance(value, (list, tuple)) and len(value) == old and _is_by_layer(name):
            values[*holder, name] = _repeated(value, new)
    return values


def _indices(name: str, value: Any, old: int, new: int) -> Any:
    """A list of which layers are of a kind, for `new` layers; None for another list."""
    if name not in _INDEX_LISTS or not isinstance(value, (list, tuple)) or not all(0 <= i < old for i in value):
        return None
    return type(value)(i + start for start in range(0, new, old) for i in value if i + start < new)


def _is_by_layer(name: str) -> bool:
    """Whether a list as long as the model is deep has its entries for the layers, as its name tells."""
    return name in _WIDTHS or any(part in name for part in ("layer", "_type", "pattern", "attention_window"))


def _repeated(value: Any, count: int) -> Any:
    return type(value)(value[i % len(value)] for i in range(count))
