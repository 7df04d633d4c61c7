"""Interleaved measurement: whatever slows the machine slows all contestants of a round alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Builds every contestant, warms it up for `steps` steps, and times `steps` steps of each in every round, in turn.

    Args:
        builders: make the contestants; all are kept until the end.
        batch: the next token ids, (batch, sequence).
        device: where the models live.
        rounds: how many.
        steps: a multiple of the interval between refreshes, so that every round holds its share of them.
        seed: of the order within the rounds.
        report: told of the progress.
    """
    pairs = []
    for build in builders:
        contestant, peak = peak_bytes(lambda build=build: _warmed_up(build(), batch, steps, device), device)  # type: ignore[misc]
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
