"""The parametrization of K-FAC and Shampoo (arXiv 2312.12226): what holds over the width, under μP and without.

MLPs of several widths on the digits. Best rate and best damping by training on a grid at every width, the change of
every layer's outputs, the loss over widths, and the first step of a network whose last layer starts at zero. `none` as
norm control with trace damping is the paper's method, `spectral` this package's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_so2.papers.digits import CLASSES, Digits
from hf_so2.papers.mup_claims import claims_of
from hf_so2.papers.mup_figure import draw
from hf_so2.papers.report import Findings
from hf_so2.papers.training import optimizer_step, single_threaded
from hf_so2.papers.widths import (
    BASE,
    LAYERS,
    Setup,
    best_value,
    feature_changes,
    kernel_solution,
    nngp_kernel,
    preactivations,
    scale_last_layer,
    score,
    slope,
)

WIDTHS = (32, 128, 256)
SEEDS = (0, 1, 2)
STEPS = 25
DAMPING = 0.1
RATES = {"none": range(-4, 3), "spectral": range(-6, 1)}  # powers of 2: the unit of a rate is another
DAMPINGS = tuple(4.0**exponent for exponent in range(-6, 2))

PAPER = tuple(Setup(method, "none", mup) for method in ("kfac", "shampoo") for mup in (True, False))
OURS = tuple(Setup(method, "spectral") for method in ("kfac", "shampoo"))
# What the paper's damping is set against knows nothing of the width.
DAMPED = (Setup("kfac"), Setup("shampoo"), Setup("kfac", mup=False, damping_rule="constant"))
FEATURE_WIDTHS = (32, 64, 128, 256)
FEATURE_STEPS = 4
LAST_LAYER_EXPONENTS = (0.5, 0.75, 1.0)
ZERO_WIDTHS = (32, 128, 512)

Curves = dict[int, dict[int, dict[float, float]]]
"""Scores by width, seed and value."""


@single_threaded
def mup_transfer() -> Findings:
    """All claims of the paper."""
    digits = Digits.load()
    rates = {str(setup): over_rates(setup, digits) for setup in (*PAPER, *OURS)}
    # Everything below is run at the rate that is best at the base width, as somebody does who tunes there.
    tuned = {name: base_optimum(curves) for name, curves in rates.items()}
    dampings = {str(s): over_dampings(s, tuned[str(Setup(s.method, mup=s.mup))], digits) for s in DAMPED}
    features = {str(setup): over_features(setup, tuned[str(setup)], digits) for setup in (*PAPER, *OURS)}
    last_layer = {
        exponent: over_last_layer(exponent, tuned[str(PAPER[0])], digits) for exponent in LAST_LAYER_EXPONENTS
    }
    zero = [first_step_from_zero(seed, tuned[str(PAPER[0])], digits) for seed in SEEDS]
    tables: dict[str, Any] = {
        "widths": WIDTHS,
        "scores_by_rate": rates,
        "scores_by_damping": dampings,
        "tuned_at_base": tuned,
        "best_rate": {name: best_values(curves) for name, curves in rates.items()},
        "best_damping": {name: best_values(curves) for name, curves in dampings.items()},
        "feature_widths": FEATURE_WIDTHS,
        "feature_change": features,
        "last_layer": last_layer,
        "zero": zero,
    }
    return Findings(claims_of(tables), tables, lambda path: draw(tables, path))


def over_rates(setup: Setup, digits: Digits) -> Curves:
    """Scores by width, seed and learning rate."""
    return {
        width: {
            seed: {
                2.0**power: score(setup, width, seed, digits, learning_rate=2.0**power, damping=DAMPING, steps=STEPS)
                for power in RATES[setup.norm_control]
            }
            for seed in SEEDS
        }
        for width in WIDTHS
    }


def over_dampings(setup: Setup, learning_rate: float, digits: Digits) -> Curves:
    """Scores by width, seed and damping, at one learning rate."""
    return {
        width: {
            seed: {
                damping: score(setup, width, seed, digits, learning_rate=learning_rate, damping=damping, steps=STEPS)
                for damping in DAMPINGS
            }
            for seed in SEEDS
        }
        for width in WIDTHS
    }


def base_optimum(curves: Curves) -> float:
    """The tried value that is best at the base width, on average over seeds."""
    of_base = curves[BASE]
    values = list(next(iter(of_base.values())))
    return min(values, key=lambda value: sum(curve[value] for curve in of_base.values()))


def best_values(curves: Curves) -> dict[int, list[float]]:
    """The best value by width, for every seed."""
    return {width: [best_value(curve) for curve in by_seed.values()] for width, by_seed in curves.items()}


def over_features(setup: Setup, learning_rate: float, digits: Digits) -> dict[str, Any]:
    """`Δh` by seed, width and layer, and the exponents of each layer."""
    changes = {
        seed: {
            width: feature_changes(
                setup, width, seed, digits, learning_rate=learning_rate, damping=DAMPING, steps=FEATURE_STEPS
            )
            for width in FEATURE_WIDTHS
        }
        for seed in SEEDS
    }
    return {"changes": changes, "exponents": {seed: exponents(by_width) for seed, by_width in changes.items()}}


def exponents(by_width: Mapping[int, Sequence[float]]) -> list[float]:
    """Of each layer's change, over the widths."""
    return [slope(list(by_width), values) for values in zip(*by_width.values(), strict=True)]


def over_last_layer(exponent: float, learning_rate: float, digits: Digits) -> dict[str, Any]:
    """`Δh` after one step of K-FAC where the last layer starts with a standard deviation of `M^-exponent`.

    At every exponent the base width starts alike. The rates are those of K-FAC's μP, the same at every width.
    """
    setup = Setup("kfac", mup=False)
    changes = {
        seed: {
            width: feature_changes(
                setup, width, seed, digits, learning_rate=learning_rate, damping=DAMPING, steps=1,
                last_layer=(width / BASE) ** (0.5 - exponent),
            )
            for width in FEATURE_WIDTHS
        }
        for seed in SEEDS
    }  # fmt: skip
    return {"changes": changes, "exponents": {seed: exponents(by_width) for seed, by_width in changes.items()}}


def first_step_from_zero(seed: int, learning_rate: float, digits: Digits) -> dict[str, Any]:
    """What one step of K-FAC on all images makes of a network whose last layer starts at zero, and at random.

    At zero the gradient of every earlier layer is zero, so only the last one moves: by `G (A + ρI)⁻¹` with `A` the
    second moment of fixed features, which is kernel ridge regression on the labels. Its kernel is that of the features,
    at infinite width the NNGP kernel.
    """
    images, tests = digits.images.double(), digits.test_images.double()
    residuals = torch.nn.functional.one_hot(digits.labels, CLASSES).double() - 1 / CLASSES
    limit = kernel_solution(
        nngp_kernel(tests, images, LAYERS - 1), nngp_kernel(images, images, LAYERS - 1), residuals, DAMPING
    )
    record: dict[str, Any] = {"seed": seed}
    for start, factor in (("zero", 0.0), ("random", 1.0)):
        by_width: dict[int, dict[str, float]] = {}
        for width in ZERO_WIDTHS:
            model, optimizer = Setup("kfac").build(width, seed, learning_rate, DAMPING)
            scale_last_layer(model, factor)
            step = optimizer_step(optimizer)
            before = preactivations(model, digits.test_images)
            hidden, hidden_test = features(model, digits.images), features(model, digits.test_images)
            own = kernel_solution(hidden_test @ hidden.mT, hidden @ hidden.mT, residuals, DAMPING)
            step(model, digits.images, digits.labels)
            after = preactivations(model, digits.test_images)
            changes = [float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]
            moved = (after[-1] - before[-1]).double()
            by_width[width] = {
                "hidden_change": max(changes[:-1]),
                "output_change": changes[-1],
                "cosine_own_kernel": _cosine(moved, own),
                "cosine_nngp_kernel": _cosine(moved, limit),
            }
        record[start] = by_width
    return record


def features(model: torch.nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    """The inputs of the last layer, float64."""
    with torch.no_grad():
        return model[:-1](images).double()


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    product = float((first * second).sum() / (first.norm() * second.norm()))
    return product if math.isfinite(product) else 0.0
