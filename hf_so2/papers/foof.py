"""Gradient descent on neurons (arXiv 2201.12250): is K-FAC second-order, and why is it good?

Three parts, all on the digits. Update directions of one and the same batch, compared by their angles. Training along
each of them, tuned alike. And the package's own K-FAC and FOOF, tuned alike, after the same steps and the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hf_so2 import optim
from hf_so2.papers.digits import TRAINING, Digits, mlp
from hf_so2.papers.directions import DIRECTIONS, cosine, gradients_of, step_along
from hf_so2.papers.report import Findings
from hf_so2.papers.training import TRIALS, Ranges, Run, optimizer_step, single_threaded, train, tune
from hf_so2.papers.verdict import Claim, Comparison, compare, differences

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
WIDTH, LAYERS, BATCH, STEPS = 50, 4, 128, 40
CURVES = tuple(range(0, STEPS, 5))
RANGES: Ranges = {"learning_rate": (3e-3, 3.0), "damping": (1e-5, 1.0)}

# With a Fisher matrix of more examples exact steps cost much, so that these runs are shorter and tuned with one seed.
LARGE, LARGE_STEPS = 512, 30
LARGE_CONTEST = ("natural gradient", "K-FAC")

# The package's optimizers, with running averages and a refresh every 10 steps.
PRODUCT_STEPS = 60
PRODUCT = {"K-FAC": "kfac", "FOOF": "foof"}

LOOKS = (0, 10, 40)
DAMPINGS = tuple(10.0**exponent for exponent in range(-6, 2))
CLOSE = 0.7  # the cosine of 45°
MATCH = 0.1  # log10: a loss a quarter higher still counts as the same


@single_threaded
def foof() -> Findings:
    """All claims of the paper."""
    digits = Digits.load(torch.float64)
    best, runs = race(DIRECTIONS, lambda name, values, seed: along(name, values, digits, seed))
    best_large, large_runs = race(
        LARGE_CONTEST, lambda name, values, seed: along(name, values, digits, seed, LARGE), seeds=1
    )
    product = Digits.load()
    best_product, product_runs = race(PRODUCT, lambda name, values, seed: optimized(name, values, product, seed))
    angles = [angles_of(seed, best["K-FAC"], digits) for seed in SEEDS]
    tables = {
        "tuned": {"one batch": best, "large Fisher": best_large, "package": best_product},
        "runs": {name: [vars(run) for run in of_method] for name, of_method in runs.items()},
        "runs with a large Fisher": {name: [vars(run) for run in each] for name, each in large_runs.items()},
        "runs of the package's optimizers": {name: [vars(run) for run in each] for name, each in product_runs.items()},
        "cosines": angles,
    }
    claims = claims_of(runs, large_runs, product_runs, angles)
    return Findings(claims, tables, lambda path: draw(runs, product_runs, angles, path))


def along(name: str, values: Mapping[str, float], digits: Digits, seed: int, examples: int | None = None) -> Run:
    """Training along one direction; with `examples`, its curvature is of so many fresh ones at each step."""
    generator = torch.Generator().manual_seed(seed + 50)

    def fresh() -> Tensor:
        return digits.images[torch.randperm(TRAINING, generator=generator)[:examples]]

    step = step_along(DIRECTIONS[name], values["learning_rate"], values["damping"], seed, fresh if examples else None)
    steps = LARGE_STEPS if examples else STEPS
    model = mlp(WIDTH, LAYERS, seed, torch.float64)
    return train(model, step, digits, steps=steps, batch=BATCH, seed=seed, looks=CURVES)


def optimized(name: str, values: Mapping[str, float], digits: Digits, seed: int) -> Run:
    """Training by one of the package's optimizers."""
    model = mlp(WIDTH, LAYERS, seed)
    settings: dict[str, Any] = {
        "norm_control": "none",
        "damping_rule": "pi" if name == "K-FAC" else "constant",
        **values,
    }
    step = optimizer_step(optim.build_optimizer(PRODUCT[name], model, **settings))
    return train(model, step, digits, steps=PRODUCT_STEPS, batch=BATCH, seed=seed, looks=range(0, PRODUCT_STEPS, 10))


def race(
    names: Iterable[str], run: Callable[[str, Mapping[str, float], int], Run], seeds: int = len(TUNING_SEEDS)
) -> tuple[dict[str, dict[str, float]], dict[str, list[Run]]]:
    """The best hyperparameters of each, by the same number of trials, and fresh runs with them, taking turns."""
    best = {}
    for name in names:

        def score(values: Mapping[str, float], seed: int, name: str = name) -> float:
            return run(name, values, seed).score

        best[name] = tune(score, RANGES, TUNING_SEEDS[:seeds])
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in SEEDS:
        for name in names:
            runs[name].append(run(name, best[name], seed))
    return best, runs


def angles_of(seed: int, kfac: Mapping[str, float], digits: Digits) -> list[dict[str, Any]]:
    """Cosines of K-FAC's update with the others', along a run of K-FAC: for each the nearest over all dampings."""
    model = mlp(WIDTH, LAYERS, seed, torch.float64)
    step = step_along(DIRECTIONS["K-FAC"], kfac["learning_rate"], kfac["damping"], seed)
    records = []
    for number, (images, labels) in enumerate(digits.batches(LOOKS[-1] + 1, BATCH, seed)):
        if number in LOOKS:
            gradients = gradients_of(model, images, labels)

            def update(name: str, damping: float) -> dict[str, Tensor]:
                same_labels = torch.Generator().manual_seed(seed)
                return DIRECTIONS[name](model, images, gradients, damping, same_labels)  # noqa: B023  used at once

            own = update("K-FAC", kfac["damping"])
            others = [name for name in DIRECTIONS if name != "K-FAC"]
            curves = {name: [cosine(own, update(name, damping)) for damping in DAMPINGS] for name in others}
            nearest = {name: max(curve) for name, curve in curves.items()}
            records.append({"seed": seed, "step": number, "nearest": nearest, "by damping": curves})
        step(model, images, labels)
    return records


def claims_of(
    runs: Mapping[str, Sequence[Run]],
    large: Mapping[str, Sequence[Run]],
    product: Mapping[str, Sequence[Run]],
    angles: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[Claim, ...]:
    """What is said of directions and of training."""
    net = f"MLP 64-{WIDTH}-{WIDTH}-{WIDTH}-10"
    trained = (
        f"{net}, {STEPS} steps, gradient and Fisher of the same {BATCH} images, one drawn label each; {TRIALS} trials"
        f" of rate and damping for each method; {len(SEEDS)} fresh seeds"
    )
    with_large = f"the same with the Fisher of {LARGE} images, {LARGE_STEPS} steps, tuned with one seed"
    compared = (
        f"{net}, updates of one batch at steps {', '.join(map(str, LOOKS))} of a K-FAC run, the others at the best of"
        f" {len(DAMPINGS)} dampings; {len(SEEDS)} seeds"
    )
    packaged = (
        f"{net}, the package's optimizers (averages, refresh every 10 steps, labels of the data), {PRODUCT_STEPS}"
        f" steps, {TRIALS} trials each; {len(SEEDS)} fresh seeds"
    )

    def loss_over(first: str, second: str, of: Mapping[str, Sequence[Run]] = runs, **bound: float) -> Comparison:
        samples = differences([run.score for run in of[first]], [run.score for run in of[second]])
        return compare(f"log10 of {first}'s training loss over {second}'s", samples, **bound)

    def nearest(name: str) -> list[float]:
        return [sum(r["nearest"][name] for r in records) / len(records) for records in angles]

    pairs = list(zip(product["FOOF"], product["K-FAC"], strict=True))
    in_time = [fast.score_after(slow.seconds[-1]) - slow.score for fast, slow in pairs]
    return (
        Claim("foof-not-close", "2201.12250", "abstract", "K-FAC's update is not close to the natural gradient (less"
              " than 45° apart)", compared,
              (compare("cosine", nearest("natural gradient"), below=CLOSE),)),
        Claim("foof-kfac-is-foof", "2201.12250", "abstract", "K-FAC's update is nearer to gradient descent on neurons"
              " than to the natural gradient", compared,
              (compare("cosine with FOOF less that with the natural gradient",
                       differences(nearest("FOOF"), nearest("natural gradient")), above=0.0),)),
        Claim("foof-beats-exact", "2201.12250", "abstract", "K-FAC has a lower loss than the natural gradient", trained,
              (loss_over("K-FAC", "natural gradient", below=0.0),)),
        Claim("foof-beats-blocks", "2201.12250", "", "K-FAC has a lower loss than the block-diagonal natural gradient,"
              " so that it is not the blocks that make it good", trained,
              (loss_over("K-FAC", "block-diagonal", below=0.0),)),
        Claim("foof-large-fisher", "2201.12250", "", "K-FAC still has a lower loss with four times the examples in the"
              " Fisher matrix", with_large, (loss_over("K-FAC", "natural gradient", large, below=0.0),)),
        Claim("foof-damping", "2201.12250", "", "with the damping that the exact matrix has, K-FAC loses its lead: its"
              " loss is higher than with heuristic damping, and not below the natural gradient's", trained, (
                  loss_over("K-FAC, standard damping", "K-FAC", above=0.0),
                  loss_over("K-FAC, standard damping", "natural gradient", above=0.0),
              )),
        Claim("foof-per-step", "2201.12250", "abstract", "FOOF's loss is below K-FAC's or the same (within a quarter)"
              " after the same number of steps", f"{trained}; and {packaged}",
              (loss_over("FOOF", "K-FAC", below=MATCH), loss_over("FOOF", "K-FAC", product, below=MATCH))),
        Claim("foof-in-time", "2201.12250", "abstract", "FOOF's step takes less time, and its loss is below K-FAC's or"
              " the same after the same time", packaged, (
                  compare("time of FOOF's steps over K-FAC's", [a.seconds[-1] / b.seconds[-1] for a, b in pairs],
                          below=1.0),
                  compare("log10 of FOOF's loss over K-FAC's when K-FAC is done", in_time, below=MATCH),
              )),
    )  # fmt: skip


def draw(
    runs: Mapping[str, Sequence[Run]],
    product: Mapping[str, Sequence[Run]],
    angles: Sequence[Sequence[Mapping[str, Any]]],
    path: Path,
) -> None:
    """Losses along the directions, cosines over the damping, and losses of the package's optimizers over time."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for index, (name, of_method) in enumerate(runs.items()):
        for number, run in enumerate(of_method):
            if all(math.isfinite(loss) for loss in run.losses):
                label = name if number == 0 else None
                left.plot(run.steps, run.losses, color=f"C{index}", alpha=0.6, linewidth=1, label=label)
        curves = [record["by damping"].get(name) for records in angles for record in records]
        if all(curves) and name != "gradient":
            for number, curve in enumerate(curves):
                label = name if number == 0 else None
                middle.plot(DAMPINGS, curve, color=f"C{index}", alpha=0.3, linewidth=1, label=label)
    for name, of_method in product.items():
        color = f"C{list(runs).index(name)}"
        for number, run in enumerate(of_method):
            label = name if number == 0 else None
            right.plot(run.seconds, run.losses, color=color, alpha=0.6, linewidth=1, label=label)
    left.set(xlabel="step", ylabel="training loss (nats)", title="Along directions of one batch, tuned alike")
    middle.set(xlabel="damping of the other", ylabel="cosine", title="Angle to K-FAC's update")
    middle.set_xscale("log")
    middle.axhline(CLOSE, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="seconds of training", ylabel="training loss (nats)", title="The package's optimizers")
    for axes in (left, right):
        axes.set_yscale("log")
    left.set_ylim(top=5.0)  # a run that went astray must not flatten the rest
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        legend = axes.legend(fontsize=8)
        for line in legend.get_lines():
            line.set_alpha(1)
    figure.savefig(path, dpi=100)
