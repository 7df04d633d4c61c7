"""Roles and width ratios of every parameter, read off shapes on the meta device.

A dimension is a width when it grows from the base configuration to the same configuration made twice as wide. Its ratio
is the model's own dimension over the base's, so affine dimensions (a fused QKV with one KV head, Mamba's `in_proj`) get
their true growth. What no width moves (vocabulary, experts, positions, SSM state) is no width, also where base and
model differ in it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, initialization

from hf_so2.errors import ConfigurationError
from hf_so2.orientation import Orientation, orientations

from .native import check_comparable, native_factors
from .rules import ParameterWidth, Role
from .widths import HeadGrowth, rebuild, scale_width

Shape = tuple[int, ...]


def pattern_of(name: str) -> str:
    """The parameter's name with layer and expert indices as `*`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def layer_pattern_of(name: str) -> str:
    """The parameter's name with the index of its layer, and those of experts, as `*`; other indices say what it is."""
    steps = name.split(".")
    layer = next((i for i, step in enumerate(steps) if step.isdigit()), None)
    starred = {i for i, step in enumerate(steps) if step.isdigit() and (i == layer or "expert" in steps[i - 1])}
    return ".".join("*" if i in starred else step for i, step in enumerate(steps))


def build_on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights; the configuration and the random state stay as they were.

    Raises:
        ConfigurationError: the class cannot build this configuration.
    """
    # Some classes write into the configuration that they are given.
    config = rebuild(config, {})
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), initialization.meta_device_safe_creation_ops():
            return model_class(config)
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            "config", type(config).__name__, f"{model_class.__name__} cannot be built: {reason}"
        ) from error


def same_family(base: PretrainedConfig, config: PretrainedConfig) -> PretrainedConfig:
    """The part of `base` that describes a model of `config`'s kind: itself, or its text configuration.

    Raises:
        ConfigurationError: base and model are of different families.
    """
    for candidate in (base, base.get_text_config(decoder=True)):
        if candidate.model_type == config.model_type:
            return candidate
    raise ConfigurationError("base_config", base.model_type, f"must be of the model's family, {config.model_type!r}")


def infer_widths(model: nn.Module, base: PretrainedConfig | nn.Module) -> dict[str, ParameterWidth]:
    """Role and growth of each parameter of `model` relative to `base`.

    Args:
        model: the model to be trained; only shapes are read.
        base: the base model's configuration (for a transformers model) or the base model itself, of any device. Depth
            may
            differ: a layer that the base does not have is compared with one of the same structure that it has. A base
            module of the model's own shapes shows no growth, so every multiplier is 1 and only vectors and embeddings
            are told apart.

    Returns:
        One entry per name in `model.named_parameters()`.

    Raises:
        ConfigurationError: base and model are of different families or structures, or the base cannot be scaled.
    """
    if isinstance(base, PretrainedConfig):
        if not isinstance(model, PreTrainedModel):
            raise ConfigurationError(
                "base_config", type(base).__name__, "a model from outside transformers needs a base module"
            )
        base = same_family(base, model.config)
        check_comparable(model.config, base)
        base_model: nn.Module = build_on_meta(type(model), base)
    elif isinstance(base, nn.Module):
        base_model = base
    else:
        raise ConfigurationError("base_config", base, "must be a transformers configuration or a module")

    shapes, base_shapes = shapes_of(model), shapes_of(base_model)
    counterparts = _match_names(shapes, base_shapes)
    if isinstance(base, PretrainedConfig):
        grown = _grown_shapes(type(model), base, [(shapes[name], counterparts[name]) for name in shapes], base_shapes)
    else:
        grown = {base_name: [shapes[name]] for name, base_name in counterparts.items()}
    orientation, base_orientation = orientations(model), orientations(base_model)
    factors, base_factors = native_factors(model), native_factors(base_model)

    widths = {}
    for name, base_name in counterparts.items():
        if orientation[name].tied != base_orientation[base_name].tied:
            raise ConfigurationError(
                "base_config", base_name, "must be tied to the head as it is in the model, or not tied"
            )
        is_width = [
            any(shape[i] != size for shape in grown[base_name]) for i, size in enumerate(base_shapes[base_name])
        ]
        if not isinstance(base, PretrainedConfig) and shapes == base_shapes:
            is_width = [True] * len(is_width)
        ratios = [
            size / base_size if grows else 1.0
            for size, base_size, grows in zip(shapes[name], base_shapes[base_name], is_width, strict=True)
        ]
        scale = [
            1.0 if own == of_base else own / of_base
            for own, of_base in zip(factors.get(name, (1.0, 1.0)), base_factors.get(base_name, (1.0, 1.0)), strict=True)
        ]
        widths[name] = _classify(orientation[name], is_width, ratios, scale)
    return widths


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _grown_shapes(
    model_class: type[PreTrainedModel],
    base: PretrainedConfig,
    pairs: Collection[tuple[Shape, str]],
    base_shapes: Mapping[str, Shape],
) -> dict[str, list[Shape]]:
    """The base's shapes at twice its width, with more heads and, where the model needs it to be explained, with larger
    ones."""

    def grow(head: HeadGrowth) -> dict[str, Shape]:
        doubled = shapes_of(build_on_meta(model_class, scale_width(base, multiplier=2, head=head)))
        if doubled.keys() != base_shapes.keys():
            raise ConfigurationError("base_config", type(base).__name__, "changes its structure with its width")
        return doubled

    by_count = grow("count")
    grown = {name: [shape] for name, shape in by_count.items()}
    unexplained = any(
        size != base_size and base_size == doubled
        for shape, name in pairs
        for size, base_size, doubled in zip(shape, base_shapes[name], by_count[name], strict=True)
    )
    if unexplained:
        for name, shape in grow("size").items():
            grown[name].append(shape)
    return grown


def _match_names(shapes: Mapping[str, Shape], base_shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The base's name for each of the model's names; layers that the base does not have borrow from one that it has."""
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for name in base_shapes:
        for pattern in {layer_pattern_of(name), pattern_of(name)}:
            by_pattern[pattern].append(name)
    matched = {}
    for name, shape in shapes.items():
        found = by_pattern.get(layer_pattern_of(name)) or by_pattern.get(pattern_of(name), [])
        candidates = [name] if name in base_shapes else found
        if not candidates:
            raise ConfigurationError(
                "base_config", name, "is a parameter of the model that the base model does not have"
            )
        if len({base_shapes[candidate] for candidate in candidates}) > 1:
            raise ConfigurationError(
                "base_config", name, "has no counterpart, and the base's other layers differ in shape"
            )
        if len(base_shapes[candidates[0]]) != len(shape):
            raise ConfigurationError(
                "base_config", base_shapes[candidates[0]], f"shape of {name} must have the rank of {shape}"
            )
        matched[name] = candidates[0]
    return matched


def _classify(
    orientation: Orientation, is_width: Sequence[bool], ratios: Sequence[float], scale: Sequence[float]
) -> ParameterWidth:
    def grows(dimensions: tuple[int, ...]) -> bool:
        return any(is_width[dimension] for dimension in dimensions)

    m_in = math.prod(ratios[dimension] for dimension in orientation.fan_in)
    m_out = math.prod(ratios[dimension] for dimension in orientation.fan_out + orientation.batch)
    out_grows, in_grows = grows(orientation.fan_out + orientation.batch), grows(orientation.fan_in)
    role: Role
    if not orientation.fan_in:
        role = "vector" if len(ratios) > 0 else "scalar"
    elif in_grows:
        role = "hidden" if out_grows else "output"
    else:
        role = "input" if out_grows else "scalar"
    return ParameterWidth(role, m_in, m_out, orientation.tied, *scale)
