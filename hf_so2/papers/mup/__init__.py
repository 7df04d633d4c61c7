"""The parametrization of K-FAC and Shampoo (arXiv 2312.12226): what holds over the width, under μP and without.

MLPs on the digits and small Llamas on text. Every method is tuned on the narrowest network, alike; then its best rate
and best damping are looked for at every width, on a grid around the tuned values. The MLP shows besides how much every
layer's outputs change, and the first step of a network whose last layer starts at zero. `none` as norm control with
trace damping is the paper's method, `spectral` this package's default; under the standard parametrization (SP) nothing
knows of the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_so2.papers.mup import kernel
from hf_so2.papers.mup.claims import claims_of
from hf_so2.papers.mup.curves import exponents
from hf_so2.papers.mup.features import feature_changes
from hf_so2.papers.mup.figure import draw
from hf_so2.papers.mup.setups import LLAMA, MLP, OURS, PAPER, Network, Setup
from hf_so2.papers.report import Findings
from hf_so2.papers.training import tune
from hf_so2.papers.workers import each

FEATURE_WIDTHS = (32, 64, 128, 256, 512)
FEATURE_STEPS = 4
LAST_LAYER_EXPONENTS = (0.5, 0.75, 1.0)
KERNEL_SEEDS = 5


def mup_transfer(workers: int) -> Findings:
    """All claims of the paper."""
    networks = {network.name: over_widths(network, workers) for network in (MLP, LLAMA)}
    tuned = networks[MLP.name]["tuned"]
    kfac = str(PAPER[0])
    tables: dict[str, Any] = {
        "networks": networks,
        "feature_widths": FEATURE_WIDTHS,
        "feature_change": {str(setup): over_features(setup, tuned[str(setup)], workers) for setup in (*PAPER, *OURS)},
        "last_layer": {b: over_last_layer(b, tuned[kfac], workers) for b in LAST_LAYER_EXPONENTS},
        "zero": each(kernel.first_step_from_zero, range(KERNEL_SEEDS), workers),
    }
    return Findings(claims_of(tables), tables, lambda path: draw(tables, path))


def over_widths(network: Network, workers: int) -> dict[str, Any]:
    """What was tuned at the base width, and scores over rates and dampings around that at every width.

    Dampings are looked at on the MLP only, without spectral control.
    """
    tuned = {}
    for setup in (*PAPER, *OURS):

        def score(values: Mapping[str, float], seed: int, setup: Setup = setup) -> float:
            return setup.score(network, network.base, seed, values)

        tuned[str(setup)] = tune(score, setup.ranges, network.tuning_seeds, workers, coarse_seeds=2)
    swept = {"learning_rate": (*PAPER, *OURS), "damping": PAPER if network is MLP else ()}
    scores = {what: over(network, what, setups, tuned, workers) for what, setups in swept.items()}
    return {
        "widths": network.widths,
        "run": f"{network.described}, M = {', '.join(map(str, network.widths))}, {network.steps} steps of"
        f" {network.batch}, tuned at M = {network.base}; {network.seeds} seeds",
        "tuned": tuned,
        "rates": scores["learning_rate"],
        "dampings": scores["damping"],
    }


def over(
    network: Network, what: str, setups: tuple[Setup, ...], tuned: Mapping[str, Mapping[str, float]], workers: int
) -> dict[str, dict[int, dict[int, dict[int, float]]]]:
    """Scores by setup, width, seed and power of 2 over the tuned value of `what`, the other being as tuned."""
    jobs = [
        (setup, width, seed)
        for width in sorted(network.widths, reverse=True)  # the longest first: none is left over at the end
        for setup in setups
        for seed in range(network.seeds)
    ]

    def curve(job: tuple[Setup, int, int]) -> dict[int, float]:
        setup, width, seed = job
        values = tuned[str(setup)]
        return {
            power: setup.score(network, width, seed, {**values, what: values[what] * 2.0**power})
            for power in network.grid
        }

    found = dict(zip(jobs, each(curve, jobs, workers), strict=True))
    return {
        str(setup): {
            width: {seed: found[setup, width, seed] for seed in range(network.seeds)} for width in network.widths
        }
        for setup in setups
    }


def over_features(
    setup: Setup, values: Mapping[str, float], workers: int, steps: int = FEATURE_STEPS, last_layer: float = 0.0
) -> dict[str, Any]:
    """`Δh` by seed, width and layer, and the exponents of each layer.

    Args:
        last_layer: the power of the width, over the base's, that multiplies the initial weights of the last layer.
    """
    jobs = [(width, seed) for width in FEATURE_WIDTHS for seed in range(MLP.seeds)]

    def change(job: tuple[int, int]) -> list[float]:
        width, seed = job
        return feature_changes(setup, width, seed, values, steps, (width / MLP.base) ** last_layer)

    found = dict(zip(jobs, each(change, jobs, workers), strict=True))
    changes = {seed: {width: found[width, seed] for width in FEATURE_WIDTHS} for seed in range(MLP.seeds)}
    return {"changes": changes, "exponents": {seed: exponents(by_width) for seed, by_width in changes.items()}}


def over_last_layer(exponent: float, values: Mapping[str, float], workers: int) -> dict[str, Any]:
    """`Δh` after one step of K-FAC where the last layer starts with a standard deviation of `M^-exponent`.

    At every exponent the base width starts alike. The rates are those of K-FAC's μP, the same at every width.
    """
    setup = Setup("kfac", mup=False, damping_rule="trace")
    return over_features(setup, values, workers, steps=1, last_layer=0.5 - exponent)
