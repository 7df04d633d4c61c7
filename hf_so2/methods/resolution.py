"""The settings of one method: the user's settings over the method's defaults. A setting without effect is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from hf_so2.errors import ConfigurationError
from hf_so2.methods.settings import SETTING_NAMES, Settings
from hf_so2.spelling import did_you_mean

# The messages for a setting that needs a part that the chosen method lacks.
INSTEAD = {
    "momentum": "a method with momentum",
    "curvature": "a method with curvature",
    "statistics": "a method with curvature statistics",
    "damping": "a method with damping",
    "tokens": "a method of the K-FAC family",
    "token moments": "ekfac or tekfac",
    "expanded tokens": "a method of the K-FAC family and weight_sharing='expand'",
    "exponents": "kfac or tkfac",
    "factors": "a method with curvature factors",
    "gradients": "a method of the Shampoo family",
    "shampoo": "shampoo",
    "basis": "soap",
    "average": "a method with curvature statistics that are averaged, not summed up",
    "moving momentum": "a method with curvature and momentum above 0",
    "whole weights": "a method with curvature, and no block_size",
    "gradient alone": "a method that uses the gradient alone: shampoo, soap, kl_shampoo or muon",
    "kl_clip": "norm_control='kl_clip'",
    "embedding_damping": "precondition_embeddings=True and a method of the K-FAC family",
    "head_output_factor": "precondition_head=True and a method with output factors",
}


def parts_in_use(uses: frozenset[str], settings: Settings) -> frozenset[str]:
    """All parts that a field's `needs` can name: the parts of a method, and those that other settings switch on."""
    switched_on = {
        settings.norm_control: "curvature" in uses,
        "average": "statistics" in uses and settings.shampoo_accumulation == "ema",
        "moving momentum": "curvature" in uses and settings.momentum > 0,
        "expanded tokens": "tokens" in uses and settings.weight_sharing == "expand",
        "whole weights": "curvature" in uses and settings.block_size is None,
        "gradient alone": "curvature" in uses and "tokens" not in uses,
        "embedding_damping": settings.precondition_embeddings and "tokens" in uses,
        "head_output_factor": settings.precondition_head and "output factors" in uses,
    }
    return uses | {part for part, is_on in switched_on.items() if is_on}


def resolve(
    method: str, uses: frozenset[str], defaults: Mapping[str, Any], given: Mapping[str, Any], **aliases: str
) -> Settings:
    """The settings of one optimizer: the given ones, then the method's defaults, then those of `Settings`.

    Args:
        method: the optimizer's name, for messages.
        uses: the parts that the method has, as in the fields' `needs`.
        defaults: the method's own defaults.
        given: the user's settings; None means "not given".
        aliases: other spellings of a setting, alias to name.

    Raises:
        ConfigurationError: an unknown name, a value out of range, or a setting that this method would ignore.
    """
    asked: dict[str, Any] = {}
    for name, value in given.items():
        field_name = aliases.get(name, name)
        if field_name not in SETTING_NAMES:
            known = [*SETTING_NAMES, *aliases]
            raise ConfigurationError(name, value, f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
        if value is None:
            continue
        if field_name in asked:
            raise ConfigurationError(name, value, f"must not be given beside {field_name}, which is the same setting")
        asked[field_name] = value
    settings = Settings(**{**defaults, **asked})
    if "bias_learning_rate" not in asked and settings.bias_learning_rate and settings.fallback_learning_rate:
        # A user who lowers the one wants no parameter of the fallback to be faster.
        slower = min(settings.bias_learning_rate, settings.fallback_learning_rate)
        settings = replace(settings, bias_learning_rate=slower)
    parts = parts_in_use(uses, settings)
    for entry in fields(Settings):
        needs = entry.metadata["needs"]
        if entry.name in asked and needs and needs not in parts:
            raise ConfigurationError(
                entry.name, asked[entry.name], f"has no effect on {method}; it needs {INSTEAD[needs]}"
            )
    if settings.adaptive_damping and settings.norm_control not in ("none", "kl_clip"):
        # If the length of an update is fixed, damping only rotates it. The measured ratio judges lengths.
        allowed = f"needs norm_control none or kl_clip, not {settings.norm_control}"
        raise ConfigurationError("adaptive_damping", True, allowed)
    return settings
