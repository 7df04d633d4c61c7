"""Settings that methods start from, by norm control: the unit of a learning rate depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_so2.engine.norm_control import NORM_CONTROLS

# Tuned for K-FAC on configs/quickstart.yaml, and the best of the rates tried there for the others, Muon excepted: all
# singular values of its updates have that size (docs/results.md).
SPECTRAL = {"lr": 0.06, "fallback_learning_rate": 0.08, "hidden_fallback_learning_rate": 0.002}

# The best of what was tried there for the K-FAC family: the clip sets the size of the steps until the rate has decayed.
# At a tenth of this rate a bound of 1e-3 or more is never reached.
CLIPPED = {"lr": 0.1, "kl_clip": 1e-4, "fallback_learning_rate": 0.04}


def untuned(
    plain: float, clipped: Mapping[str, float] | None = None, **others: float
) -> Mapping[str, Mapping[str, Any]]:
    """Rates where another norm control gives them another unit: safe to start from on small Llamas, not tuned.

    Args:
        plain: the learning rate where nothing but the method fixes the size of a step.
        clipped: what differs under the KL clip.
        others: settings that go with either.
    """
    alone = {"lr": plain, **others}
    return {
        "none": alone,
        "kl_clip": {**alone, **(clipped or {})},
        **{name: {"lr": control.lr} for name, control in NORM_CONTROLS.items() if control.lr is not None},
    }
