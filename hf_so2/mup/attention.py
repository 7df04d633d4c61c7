"""The attention scale where the head size grows: `1/d` instead of `1/sqrt(d)`, equal at the base model's head size.

With `d` the head size, the scores of a model in muP are `base_scale * (base_d / d) * q.k`, that is the family's own
scale times `sqrt(base_d / d)` where that is `1/sqrt(d)` (Yang et al. 2022, arXiv 2203.03466, section 4). A module's
`.scaling` is not saved, so the factor has to take a form that plain transformers loads: a configuration field where the
family has one, else it is folded into weights (`folding`). Which weights, is tried on a small model of the family and
proved by its logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_so2.errors import ConfigurationError

from .roles import build_on_meta, pattern_of
from .rules import ParameterWidth
from .running import run_on_example
from .widths import head_sizes, rebuild, scale_width

_HEAD_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "head_size")
# Fields from which families take the scale, and the power of the scale that they hold.
_SCALE_FIELDS = {"attention_multiplier": 1, "query_pre_attn_scalar": -2}
_QUERY_NORMS = ("q_norm", "query_norm", "query_layernorm", "q_layernorm", "q_ln")
_QUERIES = ("q_b_proj", "q_proj", "query", "q_lin", "wq")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "wo", "o")


@dataclass(frozen=True)
class Fold:
    """Powers of the factor that go into one attention module's weights.

    Args:
        outputs: power by child module whose output takes it (weight and bias).
        inputs: power by child module whose input carries its inverse (weight only).
        gain_offset: what the module adds to its weight before using it; 1 for Gemma's kind of norm.
    """

    outputs: Mapping[str, float]
    inputs: Mapping[str, float]
    gain_offset: float = 0.0


def attention_factors(model: PreTrainedModel, base_model: PreTrainedModel) -> dict[str, float]:
    """The factor that each attention module's scale still needs, by module name; empty where none does.

    Raises:
        ConfigurationError: heads grow in size, but a module's scale is not an attribute `.scaling`.
    """
    grown, base_grown = head_sizes(model.config), head_sizes(base_model.config)
    found = False
    counterparts = {pattern_of(name): module for name, module in base_model.named_modules()}
    counterparts |= dict(base_model.named_modules())
    factors = {}
    for name, module in model.named_modules():
        base = counterparts.get(name, counterparts.get(pattern_of(name)))
        size, base_size = _head_size(module), _head_size(base)
        if size is None or base_size is None or size == base_size:
            continue
        if hasattr(module, "ssm_state_size"):
            # A state-space layer contracts over its state; its heads' size is an ordinary width.
            found = True
            continue
        scale, base_scale = getattr(module, "scaling", None), getattr(base, "scaling", None)
        if not isinstance(scale, (int, float)) or not isinstance(base_scale, (int, float)):
            raise ConfigurationError(
                "head_dim", size, f"scale of {type(module).__name__} not found; must stay {base_size}"
            )
        found = True
        factor = base_scale * base_size / size / scale
        if abs(factor - 1) > 1e-9:  # some families have 1/d by themselves
            factors[name] = factor
    if grown != base_grown and not found:
        sizes, base_sizes = (
            ", ".join(str(size) for size in found_sizes.values()) for found_sizes in (grown, base_grown)
        )
        raise ConfigurationError(
            "head_dim", sizes, f"scale of {type(model).__name__}'s attention not found; must stay {base_sizes}"
        )
    return factors


def _head_size(module: nn.Module | None) -> int | None:
    """The contracted size of an attention module's heads; None for what is no attention module."""
    projects = module is not None and any(isinstance(inner, (nn.Linear, Conv1D)) for inner in module.modules())
    if not projects or isinstance(module, PreTrainedModel):
        return None
    return next((size for name in _HEAD_SIZES if isinstance(size := getattr(module, name, None), int)), None)


def scale_field(model: PreTrainedModel, factors: Mapping[str, float]) -> tuple[str, float] | None:
    """The text configuration's field and its value that give every attention module its scale, or None where the family
    has none."""
    text = model.config.get_text_config(decoder=True)
    modules = dict(model.named_modules())
    for field, power in _SCALE_FIELDS.items():
        current, factor = getattr(text, field, None), next(iter(factors.values()))
        if not isinstance(current, (int, float)) or len(set(factors.values())) > 1:
            continue
        value: float = current * factor**power
        if isinstance(current, int):
            if abs(value - round(value)) > 1e-9 * value:
                continue
            value = round(value)
        path = (field,) if text is model.config else ("text_config", field)
        rebuilt = dict(build_on_meta(type(model), rebuild(model.config, {path: value})).named_modules())
        # A field that is there but not read would leave the scale as it was.
        if all(abs(rebuilt[name].scaling / (modules[name].scaling * f) - 1) < 1e-6 for name, f in factors.items()):
            return field, value
    return None


def find_fold(model: PreTrainedModel, base_config: PretrainedConfig) -> Fold:
    """Which weights can carry the factor of an attention scale, found and proved on the base with twice its head size.

    Raises:
        ConfigurationError: none can (a nonlinearity stands between them and the scores).
    """
    grown_config = scale_width(base_config, multiplier=2, head="size")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = type(model)(grown_config).to(torch.float32)
    names = attention_factors(probe, build_on_meta(type(model), base_config))
    modules = [probe.get_submodule(name) for name in names]
    for module in modules:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # scores large enough to tell the scales apart
    factor = 0.5
    plain = run_on_example(probe)
    for module in modules:
        module.scaling *= factor
    wanted = run_on_example(probe)
    for module in modules:
        module.scaling /= factor
    for fold in _possible_folds(modules[0]):
        weights = {id(p): p.detach().clone() for module in modules for p in module.parameters()}
        for module in modules:
            fold_in_place(module, fold, factor)
        error = float((run_on_example(probe) - wanted).abs().max())
        if error < 0.01 * float((plain - wanted).abs().max()):
            return fold
        with torch.no_grad():
            for module in modules:
                for parameter in module.parameters():
                    parameter.copy_(weights[id(parameter)])
    raise ConfigurationError(
        "head_dim", type(model).__name__, "no weight can carry its attention scale; must stay the base's"
    )


def _possible_folds(module: nn.Module) -> Iterator[Fold]:
    children = {name for name, _ in module.named_children()}
    for name in _QUERY_NORMS:
        if name in children:
            yield Fold({name: 1.0}, {})
            yield Fold({name: 1.0}, {}, gain_offset=1.0)
    for name in _QUERIES:
        if name in children:
            yield Fold({name: 1.0}, {})
    for fused in _FUSED:
        for output in _OUTPUTS:
            if fused in children and output in children:
                # The values take the root of the factor along, and the output projection gives it back.
                yield Fold({fused: 0.5}, {output: -0.5})


def fold_in_place(module: nn.Module, fold: Fold, factor: float) -> None:
    """Multiplies the weights of one attention module by their powers of `factor`."""
    with torch.no_grad():
        for child, power in fold.outputs.items():
            for local, parameter in module.get_submodule(child).named_parameters():
                offset = fold.gain_offset if local.endswith("weight") else 0.0
                parameter.copy_((parameter + offset) * factor**power - offset)
        for child, power in fold.inputs.items():
            for local, parameter in module.get_submodule(child).named_parameters():
                if local.endswith("weight"):
                    parameter.mul_(factor**power)


def mark_fold(widths: dict[str, ParameterWidth], module_name: str, fold: Fold, factor: float) -> None:
    """Notes in `widths` what `fold_in_place` multiplied, so that rates and damping follow."""
    for name, width in list(widths.items()):
        for child, power in fold.outputs.items():
            if name.startswith(f"{module_name}.{child}."):
                widths[name] = replace(width, scale_out=width.scale_out / factor**power)
        for child, power in fold.inputs.items():
            if name.startswith(f"{module_name}.{child}.") and name.endswith("weight"):
                widths[name] = replace(width, scale_in=width.scale_in / factor**power)
