"""Default settings of the methods, by norm control: the unit of a learning rate depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_so2.engine.norm_control import NORM_CONTROLS

# Tuned for K-FAC on configs/quickstart.yaml. Of the learning rates tried there, it is also the best for the other
# methods, except for Muon: in Muon's updates, all singular values are as large as the largest one (docs/results.md).
SPECTRAL = {
    "lr": 0.06,
    "fallback_learning_rate": 0.08,
    "bias_learning_rate": 0.003,
    "hidden_fallback_learning_rate": 0.002,
    # 1 / (1 - adam_beta2): until then Adam's second moment is an average of fewer gradients than later.
    # docs/measurements/ten_settings.md has other values.
    "fallback_warmup_steps": 20,
}

# How often, by loss at equal time (docs/speed.md). Statistics of tokens are taken at every second step: a step shows
# them well. A gradient is one sample of the noise, so that the Shampoo family needs those of all steps; its
# decompositions are what costs most there.
TOKENS = {**SPECTRAL, "factor_update_steps": 2}
GRADIENTS = {**SPECTRAL, "preconditioner_update_steps": 20}

# The best of the values tried there for the K-FAC family. The clip sets the size of the steps until the learning rate
# has decayed. At a tenth of this learning rate, a bound of 1e-3 or more is never reached.
CLIPPED = {"lr": 0.1, "kl_clip": 1e-4, "fallback_learning_rate": 0.04}


def untuned(
    plain: float, clipped: Mapping[str, float] | None = None, **others: float
) -> Mapping[str, Mapping[str, Any]]:
    """Settings under the other norm controls, which give learning rates another unit.

    They are not tuned, but are a safe start on small Llamas.

    Args:
        plain: the learning rate where only the method sets the size of a step.
        clipped: the settings that differ under the KL clip.
        others: settings for both cases.
    """
    alone = {"lr": plain, **others}
    return {
        "none": alone,
        "kl_clip": {**alone, **(clipped or {})},
        **{name: {"lr": control.lr} for name, control in NORM_CONTROLS.items() if control.lr is not None},
    }
