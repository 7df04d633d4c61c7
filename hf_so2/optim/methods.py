"""The optimizers by name. A new curvature method is one file in `hf_so2.curvature` and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_so2.curvature import EKFAC, FOOF, KFAC, TEKFAC, TKFAC, CurvatureBlock
from hf_so2.errors import ConfigurationError
from hf_so2.mup import ParameterWidth, rules
from hf_so2.spelling import did_you_mean


def factored_damping(width: ParameterWidth) -> Mapping[str, float]:
    """`ρ_A` on `A` and `ρ_B` on `B`."""
    return {
        "multiplier_a": rules.damping_multiplier("rho_A", width),
        "multiplier_b": rules.damping_multiplier("rho_B", width),
    }


def trace_restricted_damping(width: ParameterWidth) -> Mapping[str, float]:
    """`√λ` on both of TKFAC's factors."""
    root = rules.damping_multiplier("lambda", width) ** 0.5
    return {"multiplier_a": root, "multiplier_b": root}


def single_damping(width: ParameterWidth) -> Mapping[str, float]:
    """ρ on the curvature itself."""
    return {"multiplier": rules.damping_multiplier("S", width)}


@dataclass(frozen=True)
class Method:
    """What distinguishes one optimizer from the next.

    Args:
        name: without `_mup`; what the coverage table and the groups call it.
        lr_rule: how its learning rate scales with the width when nothing else fixes the size of its updates.
        first_order: the algorithm of everything that it does not precondition: `adamw` or `sgd`.
        block: makes the curvature block for a decay of its averages; None for a first-order method.
        damping: the width multipliers of its damping, as keywords of `hf_so2.damping.Damping`.
        defaults: settings that differ from those of `Settings`.
    """

    name: str
    lr_rule: rules.LearningRateRule
    first_order: str = "adamw"
    block: Callable[[float], CurvatureBlock] | None = None
    damping: Callable[[ParameterWidth], Mapping[str, float]] = factored_damping
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses(self) -> frozenset[str]:
        """The parts that settings can refer to; see `Settings`."""
        if self.block is not None:
            return frozenset({"curvature", "momentum"})
        return frozenset({"momentum"} if self.first_order == "sgd" else ())


# Tuned for K-FAC on configs/quickstart.yaml (docs/results.md); the others' updates have the same spectral norm.
SPECTRAL = {"lr": 0.06, "fallback_learning_rate": 0.08}

_TABLE = (
    Method("kfac", rules.KFAC, block=KFAC, defaults=SPECTRAL),
    Method("ekfac", rules.KFAC, block=EKFAC, damping=single_damping, defaults={**SPECTRAL, "damping": 1e-5}),
    Method("tkfac", rules.KFAC, block=TKFAC, damping=trace_restricted_damping, defaults=SPECTRAL),
    Method("tekfac", rules.KFAC, block=TEKFAC, damping=single_damping, defaults={**SPECTRAL, "damping": 1e-5}),
    Method("foof", rules.FOOF, block=FOOF, defaults=SPECTRAL),
    # Defaults are those of transformers' `adamw_torch` and `sgd`, which these names equal step for step.
    Method("adamw", rules.ADAM, defaults={"adam_beta2": 0.999}),
    Method("sgd", rules.SGD, first_order="sgd", defaults={"lr": 0.1, "momentum": 0.0}),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

MUP_SUFFIX = "_mup"
OPTIMIZERS: tuple[str, ...] = tuple(name + suffix for name in METHODS for suffix in ("", MUP_SUFFIX))
"""Every optimizer name: each method with and without `_mup`."""


def parse_name(name: str) -> tuple[Method, bool]:
    """The method of an optimizer name, and whether it asks for μP.

    Raises:
        ConfigurationError: the name is not in `OPTIMIZERS`.
    """
    if name not in OPTIMIZERS:
        hint = did_you_mean(str(name), OPTIMIZERS)
        raise ConfigurationError("optim", name, f"must be one of {', '.join(OPTIMIZERS)}{hint}")
    return METHODS[name.removesuffix(MUP_SUFFIX)], name.endswith(MUP_SUFFIX)
