"""How to build a deeper or shallower configuration of the same family, and how much deeper one is than another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from hf_so2.errors import ConfigurationError
from hf_so2.mup.widths import (
    DEPTH_FIELDS,
    LANGUAGE_CONFIGS,
    PER_LAYER_CONFIG,
    Path,
    declared_fields,
    rebuild,
    require_config,
)

Depths = dict[Path, int]


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
    ratios = {own[path] / of_base[path] for path in own.keys() & of_base.keys()}
    growing = ratios - {1.0}
    if len(growing) > 1:
        found = ", ".join(f"{path[-1]} {of_base[path]} to {own[path]}" for path in sorted(own.keys() & of_base.keys()))
        raise ConfigurationError("base_config", found, "must have all its numbers of layers in one ratio to the model's")
    return growing.pop() if growing else 1.0


def scale_depth(
    config: PretrainedConfig, depth: int | None = None, *, multiplier: float | None = None
) -> PretrainedConfig:
    """A configuration of the same family, `multiplier` times as deep. Its sibling is `scale_width`.

    Lists with an entry for every layer are repeated, or end earlier; if the family derives them, it does so again.

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
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
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
    if all(fields_at(fields, path) == new for path, new in values.items()):
        return rebuild(config, {})
    for path in list(values):
        holder = path[:-1]
        values |= _lists(config, holder, fields_at(fields, holder), fields_at(fields, path), values[path])
    return rebuild(config, values)


def fields_at(fields: Mapping[Any, Any], path: Path) -> Any:
    inner: Any = fields
    for step in path:
        inner = inner[step]
    return inner


def _lists(config: PretrainedConfig, holder: Path, fields: Mapping[str, Any], old: int, new: int) -> dict[Path, Any]:
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
        elif isinstance(value, (list, tuple)) and len(value) == old:
            values[*holder, name] = None if _derives(config, (*holder, name), value) else _repeated(value, new)
    return values


def _repeated(value: Any, count: int) -> Any:
    return type(value)(value[i % len(value)] for i in range(count))


def _derives(config: PretrainedConfig, path: Path, value: Any) -> bool:
    """Whether the class finds this list by itself when it is not given."""
    try:
        return bool(fields_at(declared_fields(rebuild(config, {path: None})), path) == value)
    except (ConfigurationError, LookupError):
        return False
