"""Interleaved measurement: whatever slows the machine slows all contestants of a round alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hf_so2.benchmark.contestants import Contestant
from hf_so2.benchmark.flops import FlopCounter
from hf_so2.benchmark.memory import peak_bytes
from hf_so2.benchmark.stopwatch import Stopwatch

Batch = Callable[[], Tensor]


@dataclass
class Measurement:
    """One contestant's figures.

    Args:
        name: of the optimizer.
        peak_bytes: the most that model, gradients, activations and optimizer held at a time.
        state_bytes_per_parameter: of the optimizer's state, over all parameters of the model.
        rounds: for every round the seconds of each step.
        phases: for every round the mean seconds of each phase of a step.
        flops: operations of matrix algebra in each phase of a step, mean over an interval between refreshes.
    """

    name: str
    peak_bytes: int
    state_bytes_per_parameter: float
    rounds: list[list[float]] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict)

    @property
    def mean_seconds(self) -> list[float]:
        """Of a step, by round."""
        return [sum(steps) / len(steps) for steps in self.rounds]

    def percentile(self, percent: float) -> float:
        """Seconds that this share of all steps stayed below."""
        return float(np.percentile([seconds for steps in self.rounds for seconds in steps], percent))

    def phase(self, name: str) -> float:
        """Median over rounds of the seconds that this phase takes of a step; 0 for a phase that it does not have."""
        return float(np.median([phases.get(name, 0.0) for phases in self.phases]))


def measure(
    builders: Sequence[Callable[[], Contestant]],
    batch: Batch,
    device: torch.device,
    *,
    rounds: int,
    steps: int,
    warm_up: int,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Builds every contestant, warms it up, and times `steps` steps of each in every round, in turn.

    Args:
        builders: make the contestants; all are kept until the end.
        batch: the next token ids, (batch, sequence).
        device: where the models live.
        rounds: how many.
        steps: a multiple of the interval between refreshes, so that every round holds its share of them.
        warm_up: steps before anything is timed; in the first ones preconditioners are rebuilt more often.
        seed: of the order within the rounds.
        report: told of the progress.
    """
    pairs = []
    for build in builders:
        contestant, peak = peak_bytes(lambda build=build: _warmed_up(build(), batch, warm_up, device), device)  # type: ignore[misc]
        measurement = Measurement(contestant.name, peak, contestant.state_bytes_per_parameter())
        measurement.flops = _counted(contestant, batch, steps)
        pairs.append((contestant, measurement))
        report(f"{contestant.name}: warmed up")
    order, stopwatch = random.Random(seed), Stopwatch(device)
    for number in range(rounds):
        taken: list[list[dict[str, float]]] = [[] for _ in pairs]
        # Step by step in turn: what slows the machine for a minute must not hit one of them alone.
        for _ in range(steps):
            for index in order.sample(range(len(pairs)), len(pairs)):
                pairs[index][0].step(batch(), stopwatch)
                taken[index].append(stopwatch.take())
        for (_, measurement), phases in zip(pairs, taken, strict=True):
            _record(measurement, phases)
        report(f"round {number + 1} of {rounds}")
    return [measurement for _, measurement in pairs]


def _warmed_up(contestant: Contestant, batch: Batch, steps: int, device: torch.device) -> Contestant:
    for _ in range(steps):
        contestant.step(batch(), Stopwatch(device))
    return contestant


def _counted(contestant: Contestant, batch: Batch, steps: int) -> dict[str, float]:
    def work(counter: Stopwatch) -> None:
        for _ in range(steps):
            contestant.step(batch(), counter)

    return {phase: flops / steps for phase, flops in FlopCounter().count(work).items()}


def _record(measurement: Measurement, steps: Sequence[dict[str, float]]) -> None:
    measurement.rounds.append([sum(phases.values()) for phases in steps])
    names = {name for phases in steps for name in phases}
    measurement.phases.append({name: sum(phases.get(name, 0.0) for phases in steps) / len(steps) for name in names})


@dataclass(frozen=True)
class Pace:
    """The seconds of an optimizer's first steps.

    The first steps are part of it: preconditioners are rebuilt more often there. All later steps are taken to cost the
    mean of the second half of those that were measured.

    Args:
        seconds: of each step, at least 2.
    """

    seconds: Sequence[float]

    @property
    def later(self) -> float:
        """Mean seconds of a step of the second half."""
        half = self.seconds[len(self.seconds) // 2 :]
        return sum(half) / len(half)

    def time_of(self, steps: int) -> float:
        """Seconds of so many steps from the start."""
        measured = self.seconds[:steps]
        return sum(measured) + (steps - len(measured)) * self.later

    def steps_in(self, seconds: float) -> int:
        """The most steps from the start that take no longer than this; at least 1."""
        steps, left = 0, seconds
        for taken in self.seconds:
            if taken > left:
                return max(steps, 1)
            steps, left = steps + 1, left - taken
        # A billionth more, so that the seconds of n steps are enough for n steps in spite of round-off.
        return steps + int(left * (1 + 1e-9) / self.later)


def paces(
    builders: Mapping[str, Callable[[], Contestant]],
    batch: Batch,
    device: torch.device,
    *,
    steps: int,
    seed: int,
) -> dict[str, Pace]:
    """Times the first steps of all contestants, each step in turn with all others', in shuffled order.

    Args:
        builders: make the contestants, by name; all are kept until the end.
        batch: the next token ids, (batch, sequence).
        device: where the models live.
        steps: how many of each.
        seed: of the order.
    """
    contestants = {name: build() for name, build in builders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    order, stopwatch = random.Random(seed), Stopwatch(device)
    # The very first step of a process pays for what torch sets up once.
    warm = next(iter(builders.values()))()
    warm.step(batch(), stopwatch)
    stopwatch.take()
    del warm
    for _ in range(steps):
        for name in order.sample(list(contestants), len(contestants)):
            contestants[name].step(batch(), stopwatch)
            taken[name].append(sum(stopwatch.take().values()))
    return {name: Pace(seconds) for name, seconds in taken.items()}
