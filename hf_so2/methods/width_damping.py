"""How constant damping scales with width and depth, by what it is added to. Functions return keywords of `Damping`."""

from __future__ import annotations

from typing import TypedDict

from hf_so2.mup import ParameterWidth, rules


class Multipliers(TypedDict, total=False):
    """Keywords of `hf_so2.damping.Damping`. A missing one is 1."""

    multiplier_a: float
    multiplier_b: float
    multiplier: float
    multiplier_pi: float


def _pi(width: ParameterWidth) -> float:
    """On the product of both factors' damping under the rule `pi`, which follows no width."""
    return rules.damping_multiplier("pi", width) if width.depth != 1 else 1.0


def factored_damping(width: ParameterWidth) -> Multipliers:
    """`ρ_A` on `A` and `ρ_B` on `B`."""
    return {
        "multiplier_a": rules.damping_multiplier("rho_A", width),
        "multiplier_b": rules.damping_multiplier("rho_B", width),
        "multiplier_pi": _pi(width),
    }


def trace_restricted_damping(width: ParameterWidth) -> Multipliers:
    """`√λ` on both of TKFAC's factors."""
    root = rules.damping_multiplier("lambda", width) ** 0.5
    return {"multiplier_a": root, "multiplier_b": root, "multiplier_pi": _pi(width)}


def single_damping(width: ParameterWidth) -> Multipliers:
    """ρ on the curvature itself."""
    return {
        "multiplier": rules.damping_multiplier("S", width),
        "multiplier_pi": _pi(width),
    }


def gradient_damping(width: ParameterWidth) -> Multipliers:
    """`ρ_R` on Shampoo's `R` and `ρ_L` on its `L`."""
    return {
        "multiplier_a": rules.damping_multiplier("rho_R", width),
        "multiplier_b": rules.damping_multiplier("rho_L", width),
        "multiplier_pi": _pi(width) ** 2,
    }


def whitened_damping(width: ParameterWidth) -> Multipliers:
    """On KL-Shampoo's `R` and `L`: their product scales as a squared gradient entry, so each scales as an entry."""
    entry = rules.damping_multiplier("adam_eps", width)
    return {"multiplier_a": entry, "multiplier_b": entry, "multiplier_pi": _pi(width)}
