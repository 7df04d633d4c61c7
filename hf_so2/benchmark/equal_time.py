"""How many steps of every optimizer fit into the seconds that a baseline needs for its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_so2.benchmark.contestants import Contestant
from hf_so2.benchmark.rounds import Batch
from hf_so2.benchmark.stopwatch import Stopwatch


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
