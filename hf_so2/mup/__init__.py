"""Maximal update parametrization of any transformers model: widths, depth, roles, rules, the patch and its proof."""

from .depth import scale_depth
from .patch import apply_mup, read_mup, refuse_adapters
from .report import MupReport
from .roles import infer_widths
from .rules import LearningRateRule, ParameterWidth, Role
from .widths import scale_width

__all__ = [
    "LearningRateRule",
    "MupReport",
    "ParameterWidth",
    "Role",
    "apply_mup",
    "infer_widths",
    "read_mup",
    "refuse_adapters",
    "scale_depth",
    "scale_width",
]
