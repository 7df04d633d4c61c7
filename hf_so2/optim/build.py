"""Builds an optimizer from a name, a model and settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.trainer_pt_utils import get_parameter_names

from hf_so2.distributed import refuse_other_sharding
from hf_so2.engine.statistics import Curvature
from hf_so2.errors import ConfigurationError
from hf_so2.layers import select
from hf_so2.layers.selection import Extent
from hf_so2.methods.damping_overrides import DampingOverrides
from hf_so2.methods.settings import Settings
from hf_so2.methods.table import MUP_SUFFIX, parse_name
from hf_so2.mup import ParameterWidth, apply_mup, read_mup, refuse_adapters
from hf_so2.mup.depth.configs import text_depth
from hf_so2.mup.widths import text_width
from hf_so2.optim.coverage import Coverage, CoverageReport
from hf_so2.optim.decisions import (
    damping_of,
    is_one_sided,
    layers_of,
    options_of,
    refuse_heads_of_unknown_growth,
)
from hf_so2.optim.optimizer import SecondOrderOptimizer
from hf_so2.weights.layer import Layer

# The width of a parameter without μP: all multipliers are 1.
UNSCALED = ParameterWidth("scalar", 1.0, 1.0)

# Names of parameters without weight decay in transformers' Trainer. It also leaves out LayerNorm modules.
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    base_config: PretrainedConfig | nn.Module | None = None,
    decay_parameters: Collection[str] | None = None,
    **settings: Any,
) -> SecondOrderOptimizer:
    """An optimizer for `model`, ready for a plain PyTorch or Accelerate loop.

    A `_mup` name applies μP to the model, in place, unless `apply_mup` has done so before.

    Args:
        name: one of `hf_so2.OPTIMIZERS`.
        model: any module; the parameters that require a gradient are optimized. Build before `torch.compile`, DDP or
            `accelerator.prepare`, but after `fully_shard`.
        base_config: for `_mup` names: the config of the width at which the settings were tuned. For a model that is not
            from Hugging Face, a module of this width. Optional if the model has a μP record.
        decay_parameters: names of the parameters that `weight_decay` applies to; by default those that the Trainer
            decays (neither biases nor norms).
        settings: fields of `hf_so2.methods.settings.Settings` (`lr` may be spelled `learning_rate`). A field that is
            left out takes the method's default.

    Raises:
        ConfigurationError: an unknown name or setting, a value out of range, a setting that the method or the model
            would ignore, a `_mup` name without a base, a model that μP cannot be applied to, or tensor parallelism.
    """
    method, is_mup = parse_name(name)
    if base_config is not None and not is_mup:
        allowed = f"has no effect on {name}; {name}{MUP_SUFFIX} scales rates from its width"
        raise ConfigurationError("base_config", type(base_config).__name__, allowed)
    if not isinstance(model, nn.Module):
        raise ConfigurationError("model", type(model).__name__, "must be a torch.nn.Module, whose layers are looked at")
    resolved = method.settings(settings, learning_rate="lr")
    if decay_parameters is not None:
        known = {known_name for known_name, _ in model.named_parameters(remove_duplicate=False)}
        for given in [decay_parameters] if isinstance(decay_parameters, str) else decay_parameters:
            if isinstance(decay_parameters, str) or given not in known:
                allowed = "must be a list of names of the model's parameters, as named_parameters() gives them"
                raise ConfigurationError("decay_parameters", given, allowed)
    return build_from_settings(name, model, resolved, base_config, decay_parameters)


def build_from_settings(
    name: str,
    model: nn.Module,
    resolved: Settings,
    base_config: PretrainedConfig | nn.Module | None = None,
    decay_parameters: Collection[str] | None = None,
) -> SecondOrderOptimizer:
    """`build_optimizer` for settings that are already checked."""
    method, is_mup = parse_name(name)
    refuse_other_sharding(model)
    _refuse_gradients_of_other_kinds(model)
    if is_mup:
        refuse_heads_of_unknown_growth(name, method, resolved)
    of_experts, expert_settings = method.for_experts(resolved)
    extent = Extent(
        resolved.precondition_embeddings,
        resolved.precondition_head,
        resolved.precondition_biases,
        method.why_not_tied(resolved),
        "" if of_experts.block else f"expert_method {of_experts.name}",
        one_sided_stacks="gradients" in of_experts.uses,
        split_heads=resolved.split_heads,
    )
    limit = math.inf if resolved.block_size else resolved.max_preconditioner_dim
    treatments = select(model, resolved.skip_modules, limit, extent, one_sided="gradients" in method.uses)
    widths = _widths(name, model, base_config) if is_mup else {}
    if decay_parameters is None:
        decay_parameters = get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED)

    overrides = DampingOverrides(resolved.damping_overrides, model)

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    layers: list[Layer] = []
    report: list[Coverage] = []
    for parameter_name, parameter in model.named_parameters():
        treatment = treatments.get(parameter_name)
        if treatment is None:
            report.append(Coverage(parameter_name, tuple(parameter.shape), "none", "frozen"))
            continue
        width = widths.get(parameter_name, UNSCALED)
        one_sided = is_one_sided(treatment, method, resolved)
        is_decayed = parameter_name in decay_parameters
        own = (of_experts, expert_settings) if treatment.count else (method, resolved)
        options = options_of(*own, treatment, width, one_sided=one_sided, is_decayed=is_decayed)
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append(
            (parameter_name, parameter)
        )
        damping = None
        is_bias = parameter.ndim < 2
        if method.block is not None and treatment.preconditioned and not is_bias:
            damping = damping_of(*own, treatment, width, overrides, one_sided=one_sided)
            layers += layers_of(parameter_name, parameter, treatment, *own, width, damping, one_sided)
        report.append(
            Coverage(
                parameter_name,
                tuple(parameter.shape),
                options["algorithm"],
                treatment.reason,
                width if is_mup else None,
                options["lr"],
                options["weight_decay"],
                damping,
            )
        )
    if not groups:
        raise ConfigurationError("model", type(model).__name__, "must have a parameter that requires a gradient")
    overrides.refuse_idle()
    curvature = (
        Curvature(
            model,
            layers,
            resolved.fisher,
            resolved.weight_sharing,
            resolved.curvature_matmul_precision,
            resolved.factor_token_sketch if resolved.weight_sharing == "expand" else 1,
            gradient_worker_fraction=resolved.gradient_worker_fraction,
            refresh_steps=resolved.preconditioner_update_steps,
            statistics_steps=resolved.factor_update_steps,
        )
        if layers
        else None
    )
    return SecondOrderOptimizer(
        _base_rate_first(groups.values(), resolved.lr), resolved, curvature, CoverageReport(name, report)
    )


def _widths(name: str, model: nn.Module, base: PretrainedConfig | nn.Module | None) -> Mapping[str, ParameterWidth]:
    """The widths in the model's μP record. Applies μP if the model has no record yet."""
    try:
        refuse_adapters(model)
        record = read_mup(model)
        if record is None and base is None:
            raise ConfigurationError("base_config", None, f"{name} needs the config at whose width it was tuned")
        if record is None:
            return apply_mup(model, base)
        if isinstance(base, PretrainedConfig):
            record.warn_of_another_base(text_width(base), text_depth(base) if record.base_depth else None)
        return record
    except ConfigurationError as error:
        raise with_way_out(error, name) from None


def with_way_out(error: ConfigurationError, name: str) -> ConfigurationError:
    """The error with which μP refuses a model, extended by what can be done instead."""
    if error.field != "model":
        return error
    without = name.removesuffix(MUP_SUFFIX)
    return ConfigurationError(error.field, error.value, f"{error.allowed}; {without} trains it at this width as it is")


def _refuse_gradients_of_other_kinds(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise ConfigurationError("model", name, f"is of {parameter.dtype}; must be real")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ConfigurationError("model", name, "has sparse gradients; must be built with sparse=False")


def _base_rate_first(groups: Iterable[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Put a group with the base learning rate first, if there is one: the Trainer logs the learning rate of group 0."""
    return sorted(groups, key=lambda group: group["lr"] != lr)
