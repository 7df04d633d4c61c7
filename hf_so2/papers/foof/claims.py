"""What the runs of `foof` say of the claims of arXiv 2201.12250: a pure function of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_so2.papers.foof.runs import (
    BATCH,
    DAMPINGS,
    LARGE,
    LARGE_STEPS,
    LAYERS,
    LOOKS,
    PACKAGE_STEPS,
    SEEDS,
    STEPS,
    VIT_BATCH,
    VIT_LAYERS,
    VIT_SEEDS,
    VIT_WARMUP,
    VIT_WIDTH,
    WIDTH,
)
from hf_so2.papers.races import Race
from hf_so2.papers.training import TRIALS
from hf_so2.papers.verdict import Claim, compare, differences

PAPER = "2201.12250"
CLOSE = 0.7  # the cosine of 45°
MATCH = 0.1  # log10: a loss a quarter higher still counts as the same


def claims_of(races: Mapping[str, Race], angles: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Claim, ...]:
    """What is said of directions and of training."""
    one, large = races["one batch"], races["large Fisher"]
    net = "-".join(map(str, ["MLP 64", *[WIDTH] * (LAYERS - 1), 10]))
    trained = (
        f"{net}, {STEPS} steps, gradient and Fisher of the same {BATCH} images, one drawn label each; {TRIALS} trials"
        f" of rate and damping for each method; {len(SEEDS)} fresh seeds"
    )
    with_large = f"the same with the Fisher of {LARGE} images, {LARGE_STEPS} steps, tuned with one seed"
    compared = (
        f"{net}, updates of one batch at steps {', '.join(map(str, LOOKS))} of a K-FAC run, the others at the best of"
        f" {len(DAMPINGS)} dampings; {len(SEEDS)} seeds"
    )

    def nearest(name: str) -> list[float]:
        return [sum(r["nearest"][name] for r in records) / len(records) for records in angles]

    return (
        Claim("foof-not-close", PAPER, "abstract", "K-FAC's update is not close to the natural gradient (less than 45°"
              " apart)", compared, (compare("cosine", nearest("natural gradient"), below=CLOSE),)),
        Claim("foof-kfac-is-foof", PAPER, "abstract", "K-FAC's update is nearer to gradient descent on neurons than to"
              " the natural gradient", compared,
              (compare("cosine with FOOF less that with the natural gradient",
                       differences(nearest("FOOF"), nearest("natural gradient")), above=0.0),)),
        Claim("foof-beats-exact", PAPER, "abstract", "K-FAC has a lower loss than the natural gradient", trained,
              (one.loss_over("K-FAC", "natural gradient", below=0.0),)),
        Claim("foof-beats-blocks", PAPER, "", "K-FAC has a lower loss than the block-diagonal natural gradient, so that"
              " it is not the blocks that make it good", trained,
              (one.loss_over("K-FAC", "block-diagonal", below=0.0),)),
        Claim("foof-large-fisher", PAPER, "", "K-FAC still has a lower loss with four times the examples in the Fisher"
              " matrix", with_large, (large.loss_over("K-FAC", "natural gradient", below=0.0),)),
        Claim("foof-damping", PAPER, "", "with the damping that the exact matrix has, K-FAC loses its lead: its loss is"
              " higher than with heuristic damping, and not below the natural gradient's", trained, (
                  one.loss_over("K-FAC, standard damping", "K-FAC", above=0.0),
                  one.loss_over("K-FAC, standard damping", "natural gradient", above=0.0),
              )),
        Claim("foof-per-step-batch", PAPER, "abstract", "FOOF's loss is below K-FAC's or the same (within a quarter)"
              " after the same number of steps along directions of one batch", trained,
              (one.loss_over("FOOF", "K-FAC", below=MATCH),)),
        *_of_package(races["package, MLP"], "MLP",
                     f"{net}, the package's optimizers (averages, refresh every 10 steps, labels of the data),"
                     f" {PACKAGE_STEPS} steps, {TRIALS} trials each; {len(SEEDS)} fresh seeds"),
        *_of_package(races["package, ViT"], "ViT",
                     f"ViT of width {VIT_WIDTH}, {VIT_LAYERS} layers, 16 patches, batch {VIT_BATCH}, the package's"
                     f" optimizers, {PACKAGE_STEPS} steps of which {VIT_WARMUP} warm up, {TRIALS} trials each;"
                     f" {len(VIT_SEEDS)} fresh seeds"),
    )  # fmt: skip


def _of_package(race: Race, network: str, run: str) -> tuple[Claim, ...]:
    """FOOF against K-FAC as both are used, per step and in time."""
    return (
        Claim(f"foof-per-step-{network.lower()}", PAPER, "abstract", "FOOF's loss is below K-FAC's or the same (within"
              f" a quarter) after the same number of steps of the package's optimizers, {network}", run,
              (race.loss_over("FOOF", "K-FAC", below=MATCH),)),
        Claim(f"foof-in-time-{network.lower()}", PAPER, "abstract", "FOOF's step takes less time, and its loss is below"
              f" K-FAC's or the same after the same time, {network}", run, (
                  race.time_over("FOOF", "K-FAC", below=1.0),
                  race.loss_in_time("FOOF", "K-FAC", until="K-FAC", below=MATCH),
              )),
    )  # fmt: skip
