"""What `foof` runs: training along directions of one batch, with the package's optimizers, and angles of updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2 import optim
from hf_so2.linalg import FAILURES
from hf_so2.papers.data import TRAINING, digits
from hf_so2.papers.foof.directions import DIRECTIONS, cosine, gradients_of, step_along
from hf_so2.papers.models import mlp, vit
from hf_so2.papers.races import Contest
from hf_so2.papers.training import FALLBACK, INTERVALS, Ranges, Run, optimizer_step, train

SEEDS = tuple(range(8))
VIT_SEEDS = tuple(range(5))
WIDTH, LAYERS, BATCH, STEPS = 50, 4, 128, 40
CURVES = tuple(range(0, STEPS, 5))
RANGES: Ranges = {"learning_rate": (3e-3, 3.0), "damping": (1e-5, 1.0)}

# With a Fisher matrix of more examples exact steps cost much, so that these runs are shorter and tuned with one seed.
LARGE, LARGE_STEPS = 512, 30
LARGE_CONTEST = ("natural gradient", "K-FAC")

# The package's optimizers, with running averages and a refresh every 10 steps.
PACKAGE = {"K-FAC": "kfac", "FOOF": "foof"}
PACKAGE_STEPS = 60
VIT_WIDTH, VIT_LAYERS, VIT_BATCH, VIT_WARMUP = 32, 2, 64, 10
# Without the output factor a good rate is larger.
VIT_RANGES: Mapping[str, Ranges] = {"K-FAC": RANGES, "FOOF": {**RANGES, "learning_rate": (3e-2, 30.0)}}

LOOKS = (0, 10, 40)
DAMPINGS = tuple(10.0**exponent for exponent in range(-6, 2))


def along(name: str, values: Mapping[str, float], seed: int, of_fisher: int | None = None) -> Run:
    """Training along one direction; with `of_fisher`, its curvature is of so many fresh examples at each step."""
    examples = digits(torch.float64)
    generator = torch.Generator().manual_seed(seed + 50)

    def fresh() -> Tensor:
        return examples.inputs[torch.randperm(TRAINING, generator=generator)[:of_fisher]]

    step = step_along(DIRECTIONS[name], values["learning_rate"], values["damping"], seed, fresh if of_fisher else None)
    steps = LARGE_STEPS if of_fisher else STEPS
    model = mlp(WIDTH, LAYERS, seed, torch.float64)
    return train(model, step, examples, steps=steps, batch=BATCH, seed=seed, looks=CURVES)


def optimized(
    model: Callable[[int], nn.Module], batch: int, warmup: int, name: str, values: Mapping[str, float], seed: int
) -> Run:
    """Training by one of the package's optimizers."""
    network = model(seed)
    settings: dict[str, Any] = {
        "norm_control": "none",
        "damping_rule": "pi" if name == "K-FAC" else "constant",
        **FALLBACK,
        **INTERVALS,
        **values,
    }
    step = optimizer_step(optim.build_optimizer(PACKAGE[name], network, **settings), warmup)
    looks = range(0, PACKAGE_STEPS, 10)
    return train(network, step, digits(), steps=PACKAGE_STEPS, batch=batch, seed=seed, looks=looks)


def optimized_mlp(name: str, values: Mapping[str, float], seed: int) -> Run:
    """On the network of the directions."""
    return optimized(lambda seed: mlp(WIDTH, LAYERS, seed), BATCH, 0, name, values, seed)


def optimized_vit(name: str, values: Mapping[str, float], seed: int) -> Run:
    """On a small Transformer."""
    return optimized(lambda seed: vit(VIT_WIDTH, VIT_LAYERS, seed), VIT_BATCH, VIT_WARMUP, name, values, seed)


CONTESTS = {
    "one batch": Contest(dict.fromkeys(DIRECTIONS, RANGES), along, SEEDS),
    "large Fisher": Contest(
        dict.fromkeys(LARGE_CONTEST, RANGES),
        lambda name, values, seed: along(name, values, seed, LARGE),
        SEEDS,
        tuning_seeds=(100,),
    ),
    "package, MLP": Contest(dict.fromkeys(PACKAGE, RANGES), optimized_mlp, SEEDS),
    "package, ViT": Contest(VIT_RANGES, optimized_vit, VIT_SEEDS),
}


def angles_of(seed: int, kfac: Mapping[str, float]) -> list[dict[str, Any]]:
    """Cosines of K-FAC's update with the others', along a run of K-FAC: for each the nearest over all dampings.

    A run that goes astray ends early; the looks before are of its seed.
    """
    model, examples = mlp(WIDTH, LAYERS, seed, torch.float64), digits(torch.float64)
    step = step_along(DIRECTIONS["K-FAC"], kfac["learning_rate"], kfac["damping"], seed)
    records: list[dict[str, Any]] = []
    for number, (images, labels) in enumerate(examples.batches(LOOKS[-1] + 1, BATCH, seed)):
        try:
            if number in LOOKS:
                nearest, curves = _cosines(model, images, labels, seed, kfac["damping"])
                records.append({"seed": seed, "step": number, "nearest": nearest, "by damping": curves})
            step(model, images, labels)
        except FAILURES:
            break
    return records


def _cosines(
    model: nn.Sequential, images: Tensor, labels: Tensor, seed: int, damping: float
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """With K-FAC's update at one damping, of every other one: the nearest, and all over `DAMPINGS`."""
    gradients = gradients_of(model, images, labels)

    def update(name: str, damping: float) -> dict[str, Tensor]:
        same_labels = torch.Generator().manual_seed(seed)
        return DIRECTIONS[name](model, images, gradients, damping, same_labels)

    own = update("K-FAC", damping)
    curves = {name: [cosine(own, update(name, other)) for other in DAMPINGS] for name in DIRECTIONS if name != "K-FAC"}
    return {name: max(curve) for name, curve in curves.items()}, curves
