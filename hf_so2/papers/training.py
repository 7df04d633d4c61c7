"""Training runs, and tuning that is alike for every method."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_so2.errors import TrainingDivergedError
from hf_so2.linalg import FAILURES
from hf_so2.papers.data import Examples
from hf_so2.papers.workers import each

Step: TypeAlias = Callable[[nn.Module, Tensor, Tensor], None]
"""Changes the weights of a model for one batch (inputs, labels)."""
Ranges: TypeAlias = Mapping[str, tuple[float, float]]

COARSE, REFINEMENTS = 5, (0.5, 0.25)
TRIALS = COARSE**2 + 9 + 8  # of two hyperparameters: the centre of the second refinement is known
# For parameters that are in no Kronecker block: Adam's usual rate, from the first step on.
FALLBACK: Mapping[str, float] = {
    "fallback_learning_rate": 3e-3, "bias_learning_rate": 3e-3, "fallback_warmup_steps": 1
}  # fmt: skip
# A paper's claim is not about the package's defaults, which follow speed.
INTERVALS: Mapping[str, Any] = {"factor_update_steps": 1, "preconditioner_update_steps": 10}
FLOOR = 1e-6  # nats: below it, float32 losses are round-off


@dataclass(frozen=True)
class Run:
    """What a training run left.

    Args:
        steps: when it was looked at.
        losses: mean cross-entropy on the examples that are judged by then, nats; infinite from where it diverged.
        seconds: spent on training by then, not on looking.
        accuracy: of predictions on the test examples at the end.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    accuracy: float

    @property
    def score(self) -> float:
        """log10 of the last loss: differences are then of the same weight at any level."""
        return math.log10(max(self.losses[-1], FLOOR)) if math.isfinite(self.losses[-1]) else math.inf

    def tail(self, looks: int) -> float:
        """The mean score of the last looks, which a single lucky step sways less."""
        levels = [math.log10(max(loss, FLOOR)) if math.isfinite(loss) else math.inf for loss in self.losses[-looks:]]
        return sum(levels) / len(levels)

    def score_after(self, seconds: float) -> float:
        """The same of the last look within so many seconds; infinite before the first."""
        reached = [loss for loss, second in zip(self.losses, self.seconds, strict=True) if second <= seconds]
        loss = reached[-1] if reached else math.inf
        return math.log10(max(loss, FLOOR)) if math.isfinite(loss) else math.inf


def train(
    model: nn.Module, step: Step, examples: Examples, *, steps: int, batch: int, seed: int, looks: Sequence[int] = ()
) -> Run:
    """Train for some steps and look at the loss at the start, at the end, and at `looks`."""
    at = {0, steps, *looks}
    seen: list[tuple[int, float, float]] = []
    spent = 0.0
    batches = examples.batches(steps, batch, seed)
    for number in range(steps + 1):
        if number in at:
            seen.append((number, loss_of(model, examples), spent))
            if not math.isfinite(seen[-1][1]):
                break
        if number == steps:
            break
        inputs, labels = next(batches)
        start = time.perf_counter()
        try:
            step(model, inputs, labels)
        except (TrainingDivergedError, *FAILURES):
            seen.append((steps, math.inf, spent))
            break
        spent += time.perf_counter() - start
    if seen[-1][0] < steps:
        seen.append((steps, math.inf, spent))
    numbers, losses, seconds = zip(*seen, strict=True)
    with torch.no_grad():
        accuracy = float((model(examples.test_inputs).argmax(dim=1) == examples.test_labels.flatten()).double().mean())
    return Run(numbers, losses, seconds, accuracy)


def loss_of(model: nn.Module, examples: Examples) -> float:
    """Mean cross-entropy on the examples that are judged; infinite where it is no number."""
    inputs, labels = examples.judged
    with torch.no_grad():
        loss = float(cross_entropy(model(inputs), labels))
    return loss if math.isfinite(loss) else math.inf


def optimizer_step(optimizer: Any, warmup: int = 0) -> Step:
    """A step of a `torch.optim.Optimizer` or one of this package, Fisher samples included.

    Args:
        warmup: steps in which every rate rises linearly to its own.
    """
    rates, count = [group["lr"] for group in optimizer.param_groups], itertools.count(1)
    sample = getattr(optimizer, "sample_fisher", None)

    def step(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        share = min(1.0, next(count) / warmup) if warmup else 1.0
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        logits = model(inputs)
        if not bool(torch.isfinite(logits).all()):
            raise TrainingDivergedError("a logit is not finite")
        if sample is not None:
            sample(logits)
        cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def tune(
    score: Callable[[Mapping[str, float], int], float],
    ranges: Ranges,
    seeds: Sequence[int] = (100, 101),
    workers: int = 1,
    coarse_seeds: int = 1,
) -> dict[str, float]:
    """The best values of a coarse grid, refined twice; the same number of trials whatever the method: `TRIALS`.

    The grid has five values of each hyperparameter, evenly on a logarithmic scale; then come the neighbours of the best
    at half the distance, and once more, so that an optimum on the edge of the ranges is followed beyond it. Good rates
    of curvature methods lie on a narrow ridge over the damping, which random trials on the same ranges often miss.

    Args:
        score: of some values and a seed; less is better, infinity where training diverged.
        ranges: lowest and highest value of two hyperparameters, by name.
        seeds: the refinements are run with all, averaged.
        workers: trials side by side.
        coarse_seeds: how many of the seeds the grid is run with. Where single runs are erratic, the best of a grid run
            once is the luckiest.
    """
    lows = {name: math.log(low) for name, (low, _) in ranges.items()}
    spacing = {name: math.log(high / low) / (COARSE - 1) for name, (low, high) in ranges.items()}
    known: dict[tuple[float, ...], float] = {}

    def values_of(point: tuple[float, ...]) -> dict[str, float]:
        return {name: math.exp(x) for name, x in zip(ranges, point, strict=True)}

    def best_of(points: Iterable[tuple[float, ...]], used: Sequence[int]) -> tuple[float, ...]:
        around = list(points)
        new = [point for point in around if point not in known]
        trials = [(values_of(point), seed) for point in new for seed in used]
        scores = iter(each(lambda trial: score(*trial), trials, workers))
        known.update({point: sum(next(scores) for _ in used) / len(used) for point in new})
        return min(around, key=known.__getitem__)

    axes = [[lows[name] + index * spacing[name] for index in range(COARSE)] for name in ranges]
    best = best_of(itertools.product(*axes), seeds[:coarse_seeds])
    known.clear()  # of fewer seeds
    for share in REFINEMENTS:
        axes = [[x + sign * share * spacing[name] for sign in (-1, 0, 1)] for name, x in zip(ranges, best, strict=True)]
        best = best_of(itertools.product(*axes), seeds)
    return values_of(best)
