"""Puts a model into the maximal update parametrization, in place and once."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.errors import ConfigurationError

from .report import MupReport
from .roles import infer_widths, shapes_of
from .rules import init_multiplier
from .widths import text_width

RECORD = "so2_mup"


def is_pretrained(model: nn.Module) -> bool:
    """Whether the weights came from `from_pretrained`, which leaves its key conversions on the instance."""
    return "_weight_conversions" in vars(model)


def read_mup(model: nn.Module) -> MupReport | None:
    """The report of an earlier `apply_mup`, in this process or before the model was saved; None when there was none."""
    record = getattr(model.config, RECORD, None) if isinstance(model, PreTrainedModel) else getattr(model, "_so2_mup", None)
    return None if record is None else MupReport.from_dict(record)


def apply_mup(
    model: nn.Module, base_config: PretrainedConfig | nn.Module, *, pretrained: bool | None = None
) -> MupReport:
    """Rescales the initial weights of `model` relative to the base and records what was done."""
    if read_mup(model) is not None:
        raise ConfigurationError("model", type(model).__name__, "is already in muP: apply_mup works once")
    if pretrained is None:
        pretrained = is_pretrained(model)
    widths = infer_widths(model, base_config)
    if isinstance(model, PreTrainedModel) and isinstance(base_config, PretrainedConfig):
        base_width, width = text_width(base_config), text_width(model.config)
    else:
        base_width = width = 0
    report = MupReport(widths, shapes_of(model), base_width=base_width, width=width, pretrained=pretrained)
    if not pretrained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                factor = init_multiplier(widths[name])
                if factor != 1.0:
                    parameter.mul_(factor)
    if isinstance(model, PreTrainedModel):
        setattr(model.config, RECORD, report.to_dict())
    else:
        model._so2_mup = report.to_dict()  # type: ignore[assignment]
    return report
