"""Contests: several methods train the same network, all tuned with the same number of trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_so2.papers.training import Ranges, Run, tune
from hf_so2.papers.verdict import Comparison, compare, differences
from hf_so2.papers.workers import each


@dataclass(frozen=True)
class Contest:
    """What is run.

    Args:
        ranges: two hyperparameters with their lowest and highest value, for each method by name.
        run: one training run of a method with some values and a seed.
        seeds: of the runs that are compared.
        tuning_seeds: of the trials.
    """

    ranges: Mapping[str, Ranges]
    run: Callable[[str, Mapping[str, float], int], Run]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int] = (100, 101)

    def hold(self, workers: int) -> Race:
        """Tune every method, then run all of them with fresh seeds, in turn, so that a slow moment slows them alike."""
        best = {}
        for name, ranges in self.ranges.items():

            def score(values: Mapping[str, float], seed: int, name: str = name) -> float:
                return self.run(name, values, seed).score

            best[name] = tune(score, ranges, self.tuning_seeds, workers)
        by_seed = each(lambda seed: [self.run(name, best[name], seed) for name in best], self.seeds, workers)
        return Race(best, {name: list(runs) for name, runs in zip(best, zip(*by_seed, strict=True), strict=True)})


@dataclass(frozen=True)
class Race:
    """What came of a contest.

    Args:
        best: the tuned values of each method.
        runs: with them, one for each seed.
    """

    best: Mapping[str, Mapping[str, float]]
    runs: Mapping[str, Sequence[Run]]

    def loss_over(self, first: str, second: str, **bound: float) -> Comparison:
        """Losses of two methods after the same steps."""
        samples = differences([run.score for run in self.runs[first]], [run.score for run in self.runs[second]])
        return compare(f"log10 of {first}'s loss over {second}'s", samples, **bound)

    def loss_in_time(self, first: str, second: str, *, until: str, named: str = "", **bound: float) -> Comparison:
        """The same after the seconds that `until` takes; `named` is what to call the second."""
        limits = [run.seconds[-1] for run in self.runs[until]]
        ours, theirs = (
            [run.score_after(limit) for run, limit in zip(self.runs[name], limits, strict=True)]
            for name in (first, second)
        )
        text = f"log10 of {first}'s loss over {named or second}'s when {until} is done"
        return compare(text, differences(ours, theirs), **bound)

    def time_over(self, first: str, second: str, **bound: float) -> Comparison:
        """Seconds of two methods for all their steps."""
        pairs = zip(self.runs[first], self.runs[second], strict=True)
        return compare(
            f"time of {first}'s steps over {second}'s", [a.seconds[-1] / b.seconds[-1] for a, b in pairs], **bound
        )

    @property
    def tables(self) -> dict[str, Any]:
        """For JSON."""
        return {"tuned": self.best, "runs": {name: [vars(run) for run in runs] for name, runs in self.runs.items()}}
