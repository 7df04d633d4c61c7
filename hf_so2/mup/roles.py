"""Roles and width ratios of every parameter, read off shapes on the meta device.

A dimension is a width when it grows from the base configuration to the same configuration made twice as wide. Its ratio is the
model's own dimension over the base's, so affine dimensions (a fused QKV with one KV head, Mamba's `in_proj`) get their true growth.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.pytorch_utils import Conv1D

from hf_so2.errors import ConfigurationError

from .rules import ParameterWidth, Role
from .widths import HeadGrowth, scale_width

Shape = tuple[int, ...]


def pattern_of(name: str) -> str:
    """The parameter's name with layer and expert indices as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def build_on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return model_class(config)


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Shapes of `named_parameters()` by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def infer_widths(model: nn.Module, base: PretrainedConfig | nn.Module) -> dict[str, ParameterWidth]:
    """Role and growth of each parameter of `model` relative to `base`.

    Args:
        model: the model to be trained; only shapes are read.
        base: the base model's configuration (for a transformers model) or the base model itself.

    Returns:
        One entry per name in `model.named_parameters()`.

    Raises:
        ConfigurationError: base and model are of different families, or a parameter of the model has no counterpart.
    """
    if isinstance(base, PretrainedConfig):
        if not isinstance(model, PreTrainedModel):
            raise ConfigurationError("base", type(base).__name__, "a model outside transformers needs a base nn.Module")
        if base.model_type != model.config.model_type:
            raise ConfigurationError("base", base.model_type, f"must be of the model's family, {model.config.model_type!r}")
        base_shapes = shapes_of(build_on_meta(type(model), base))
        grown = [shapes_of(build_on_meta(type(model), scale_width(base, multiplier=2, head=head))) for head in _growths(base)]
    else:
        base_shapes = shapes_of(base)
        grown = [{}]
    counterparts = _match_names(shapes_of(model), base_shapes)
    orientation = _fan_dimensions(model)
    tied = _tied_names(model)
    widths = {}
    for name, parameter in model.named_parameters():
        base_name = counterparts[name]
        shape, base_shape = tuple(parameter.shape), base_shapes[base_name]
        if len(shape) != len(base_shape):
            raise ConfigurationError("base", base_shape, f"shape of {name} differs in rank from the model's {shape}")
        references = [shapes.get(base_name, base_shape) for shapes in grown] if grown != [{}] else [shape]
        is_width = [any(ref[i] != base_shape[i] for ref in references) for i in range(len(shape))]
        widths[name] = _classify(shape, base_shape, is_width, orientation.get(name), name in tied)
    return widths


def _growths(base: PretrainedConfig) -> Sequence[HeadGrowth]:
    return ("count",)


def _match_names(names: Mapping[str, Shape], base_shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The base's name for each of the model's names; layers the base does not have borrow from one that it has."""
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for name in base_shapes:
        by_pattern[pattern_of(name)].append(name)
    matched = {}
    for name in names:
        if name in base_shapes:
            matched[name] = name
            continue
        candidates = by_pattern.get(pattern_of(name), [])
        if not candidates:
            raise ConfigurationError("base", name, "is a parameter of the model that the base model does not have")
        if len({base_shapes[candidate] for candidate in candidates}) > 1:
            raise ConfigurationError("base", name, "has no counterpart, and the base's other layers differ in shape")
        matched[name] = candidates[0]
    return matched


def _fan_dimensions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(fan_out dimension, fan_in dimension) of each matrix by parameter name."""
    dimensions = {}
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            if isinstance(module, (nn.Embedding, Conv1D)):
                fan = (1, 0)
            elif parameter.ndim == 2 or isinstance(module, nn.modules.conv._ConvNd):
                fan = (0, 1)
            else:
                fan = (parameter.ndim - 2, parameter.ndim - 1)
            dimensions[f"{prefix}.{local}" if prefix else local] = fan
    return dimensions


def _tied_names(model: nn.Module) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", {}).values())


def _classify(
    shape: Shape, base_shape: Shape, is_width: Sequence[bool], fan: tuple[int, int] | None, tied: bool
) -> ParameterWidth:
    def ratio(dimension: int) -> float:
        return shape[dimension] / base_shape[dimension] if is_width[dimension] else 1.0

    if fan is None:
        grows = [i for i in range(len(shape)) if is_width[i]]
        role: Role = "vector" if shape and (len(shape) > 1 or shape[0] > 1 or grows) else "scalar"
        return ParameterWidth(role, 1.0, ratio(grows[0]) if grows else 1.0)
    out_dim, in_dim = fan
    if is_width[out_dim] and is_width[in_dim]:
        role = "hidden"
    elif is_width[in_dim]:
        role = "output"
    elif is_width[out_dim]:
        role = "input"
    else:
        role = "vector"
    return ParameterWidth(role, ratio(in_dim), ratio(out_dim), tied)
