"""Puts a model into the maximal update parametrization, in place and once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.errors import ConfigurationError

from .attention import Fold, attention_factors, find_fold, fold_in_place, mark_fold, scale_field
from .depth.patch import DepthPatch
from .folding import fold_into_head_input, mark_folded
from .init_laws import natural_growth
from .native import logits_factor
from .report import MupReport
from .roles import build_on_meta, infer_widths, same_family, shapes_of
from .rules import ADAM, ParameterWidth, init_multiplier, learning_rate_multiplier
from .widths import RECORD_FIELD, text_width

# On the instance: this process put the model into muP, so its fresh weights match the record in its configuration.
_APPLIED = "_so2_mup"


def is_pretrained(model: nn.Module) -> bool:
    """Whether the weights came from `from_pretrained`, which leaves its key conversions on the instance."""
    return "_weight_conversions" in vars(model)


def read_mup(model: nn.Module) -> MupReport | None:
    """The report of an earlier `apply_mup`, in this process or before the model was saved; None when there was none.

    Raises:
        ConfigurationError: the configuration holds a record, but the weights are fresh, so they are not in muP.
    """
    if not isinstance(model, PreTrainedModel):
        applied = vars(model).get(_APPLIED)
        return None if applied is None else MupReport.from_dict(applied)
    record = getattr(model.config, RECORD_FIELD, None)
    if record is None:
        return None
    if not (is_pretrained(model) or _APPLIED in vars(model)):
        raise ConfigurationError(
            f"config.{RECORD_FIELD}", "a record", "does not belong to a freshly initialised model; must be removed"
        )
    return MupReport.from_record(record, shapes_of(model))


def apply_mup(
    model: nn.Module, base_config: PretrainedConfig | nn.Module, *, pretrained: bool | None = None
) -> MupReport:
    """Puts `model` into muP relative to a base model, in place.

    Initial weights are rescaled by the table of `rules` (on top of what the family's own initialisation does with the
    width), attention scales follow the head size, and the logits of a tied head are divided by the growth of the width.
    Factors take forms that plain transformers saves and loads: a reload computes the same logits without this package.
    With a base of another depth, residual branches are multiplied by its depth over the model's (`depth.patch`). The
    record goes into `model.config.so2_mup`. At the base width and depth nothing changes.

    Args:
        model: a transformers model of any family, fresh or pretrained, or any module. Weights on a real device.
        base_config: the base model's configuration, of the same family and not wider, of any depth; for a module
            from outside transformers the base module, of the same depth, with its initial weights.
        pretrained: keep the weights, so that only learning rates, damping and decay scale. None: detected.

    Returns:
        What was done, by parameter.

    Raises:
        ConfigurationError: the model cannot be put into muP relative to this base; it is left untouched.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError("model", type(model).__name__, "must be a model, a torch.nn.Module")
    _check_patchable(model)
    pretrained = is_pretrained(model) if pretrained is None else pretrained
    widths = infer_widths(model, base_config)
    notes: list[str] = []
    base_width = width = 0
    if isinstance(model, PreTrainedModel) and isinstance(base_config, PretrainedConfig):
        base_config = _checked_base(base_config, model.config)
        base_width, width = text_width(base_config), text_width(model.config)
    init = {} if pretrained else _init_factors(model, base_config, widths)
    depth = DepthPatch(model, base_config, widths, pretrained)
    if isinstance(model, PreTrainedModel) and isinstance(base_config, PretrainedConfig):
        attention = _AttentionPatch(model, base_config, pretrained)
        _own_config(model)
        # The one change that tries before it knows. It comes before all others and undoes itself when it fails.
        _scale_tied_logits(model, base_config, widths, notes, pretrained)
        attention.apply(widths, notes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if init.get(name, 1.0) != 1.0:
                parameter.mul_(init[name])
    depth.apply(widths, notes)
    report = MupReport(
        widths,
        shapes_of(model),
        base_width=base_width,
        width=width,
        base_depth=depth.base_depth,
        depth=depth.depth,
        pretrained=pretrained,
        notes=notes,
    )
    vars(model)[_APPLIED] = report.to_dict()
    if isinstance(model, PreTrainedModel):
        setattr(model.config, RECORD_FIELD, report.record())
    return report


def refuse_adapters(model: nn.Module) -> None:
    """Raise of a model that PEFT has put adapters into, itself or in a wrapper: no base of another width has them.

    Raises:
        ConfigurationError: it has adapters.
    """
    if getattr(model, "peft_config", None):
        raise ConfigurationError("model", type(model).__name__, "has adapters, for which muP has no rule")


def _check_patchable(model: nn.Module) -> None:
    if read_mup(model) is not None:
        raise ConfigurationError("model", type(model).__name__, "is in muP already; apply_mup works once")
    refuse_adapters(model)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise ConfigurationError("model", type(model).__name__, "is quantized; must hold floating-point weights")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigurationError("model", name, f"is of {parameter.dtype}; must be floating point")
        if parameter.is_meta:
            raise ConfigurationError("model", name, "is on the meta device; must hold its weights")


def _checked_base(base: PretrainedConfig, config: PretrainedConfig) -> PretrainedConfig:
    base = same_family(base, config)
    record = getattr(base, RECORD_FIELD, None)
    if record is not None and record["width"] != record["base_width"]:
        raise ConfigurationError("base_config", record["width"], f"is itself scaled from width {record['base_width']}")
    if record is not None and record.get("depth") != record.get("base_depth"):
        raise ConfigurationError("base_config", record["depth"], f"is itself scaled from depth {record['base_depth']}")
    if text_width(base) > text_width(config):
        raise ConfigurationError(
            "base_config", text_width(base), f"must not be wider than the model, {text_width(config)}"
        )
    return base


def _own_config(model: PreTrainedModel) -> None:
    """Gives the model a configuration of its own: the one it was built from may serve for other models as well."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        own = copies.get(id(vars(module).get("config")))
        if own is not None:
            module.config = own


def _init_factors(
    model: nn.Module, base: PretrainedConfig | nn.Module, widths: Mapping[str, ParameterWidth]
) -> dict[str, float]:
    """What to multiply each initial weight with, so that its standard deviation is the base's times the table's
    factor."""
    growth = natural_growth(model, base, widths)
    factors = {name: init_multiplier(width) / growth.get(name, 1.0) for name, width in widths.items()}
    return {name: 1.0 if abs(factor - 1) < 1e-9 else factor for name, factor in factors.items()}


def _scale_tied_logits(
    model: PreTrainedModel,
    base_config: PretrainedConfig,
    widths: dict[str, ParameterWidth],
    notes: list[str],
    pretrained: bool,
) -> None:
    """Divides the logits of tied heads by the growth of the width; for pretrained weights, slows the matrix instead."""
    native = logits_factor(model.config) / logits_factor(base_config)
    for name, width in list(widths.items()):
        if not width.tied:
            continue
        if pretrained:
            # A factor on the logits would change the function, so the matrix takes the slower of its two roles' rates.
            as_head = replace(width, role="output", m_in=width.m_out, m_out=1.0, scale_in=1.0, scale_out=native)
            widths[name] = min(width, as_head, key=lambda role: learning_rate_multiplier(ADAM, role))
            continue
        # The matrix is stored for its role as embedding; where the family multiplies embeddings, the head undoes that.
        factor = width.scale_in * width.scale_out / (width.m_out * native)
        if factor != 1.0:
            carriers = fold_into_head_input(model, _tied_head(model, model.get_parameter(name)), factor)
            mark_folded(widths, carriers, factor)
            notes.append(f"logits of the tied head times {factor:g}: folded into {', '.join(carriers)}")


def _tied_head(model: PreTrainedModel, matrix: nn.Parameter) -> nn.Module:
    sharing = [m for m in model.modules() if any(p is matrix for p in m.parameters(recurse=False))]
    return next(module for module in reversed(sharing) if not isinstance(module, nn.Embedding))


class _AttentionPatch:
    """The change of attention scales, planned without touching the model."""

    def __init__(self, model: PreTrainedModel, base_config: PretrainedConfig, pretrained: bool) -> None:
        self._model, self._pretrained = model, pretrained
        self._factors = attention_factors(model, build_on_meta(type(model), base_config))
        self._field = None
        self._fold: Fold | None = None
        if self._factors:
            self._field = None if pretrained else scale_field(model, self._factors)
            self._fold = find_fold(model, base_config) if self._field is None else None

    def apply(self, widths: dict[str, ParameterWidth], notes: list[str]) -> None:
        if not self._factors:
            return
        summary = ", ".join(sorted({f"{factor:g}" for factor in self._factors.values()}))
        if self._field is not None:
            field, value = self._field
            setattr(self._model.config.get_text_config(decoder=True), field, value)
            for name, factor in self._factors.items():
                self._model.get_submodule(name).scaling *= factor
            notes.append(f"attention scale times {summary}: config.{field} = {value:g}")
        if self._fold is not None:
            for name, factor in self._factors.items():
                if not self._pretrained:
                    fold_in_place(self._model.get_submodule(name), self._fold, factor)
                # Pretrained weights are taken to carry the factor already: only their rates change.
                mark_fold(widths, name, self._fold, factor)
            where = ", ".join([*self._fold.outputs, *self._fold.inputs])
            how = "attributed to" if self._pretrained else "folded into"
            notes.append(f"attention scale times {summary}: {how} {where}")
