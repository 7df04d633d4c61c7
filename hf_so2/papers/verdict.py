"""What measured samples say of a claim: it holds here, does not, or is not decided by so few runs.

Pure functions of numbers. A claim is one or more comparisons of a mean with a bound that was fixed beforehand; a
comparison is decided where the whole confidence interval of the mean lies on one side of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Literal, TypeAlias

from scipy import stats

CONFIDENCE = 0.95
FEWEST = 3  # samples: of two, an interval says next to nothing

Sense: TypeAlias = Literal["below", "above"]


class Outcome(Enum):
    """What came of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "not decided"


def interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval of the mean of independent samples.

    Runs that diverged are infinite: where all did, so is the mean; where some did, there is none and the interval is
    the whole line, as it is for a NaN and for fewer than three samples.
    """
    if len(samples) < FEWEST or any(math.isnan(value) for value in samples):
        return -math.inf, math.inf
    infinite = [value for value in samples if math.isinf(value)]
    if infinite:
        return (infinite[0],) * 2 if set(samples) == {infinite[0]} else (-math.inf, math.inf)
    mean = math.fsum(samples) / len(samples)
    error = float(stats.sem(samples))
    if error == 0:
        return mean, mean
    reach = error * float(stats.t.ppf((1 + confidence) / 2, len(samples) - 1))
    return mean - reach, mean + reach


@dataclass(frozen=True)
class Comparison:
    """A claimed inequality on a mean.

    Args:
        quantity: what was measured, with its unit.
        samples: one per independent seed.
        sense: whether the claim says that the mean lies below or above the bound.
        bound: fixed before anything was measured. A mean that is exactly the bound is on the claimed side, so that
            "no worse than" can be claimed of what is the same by construction.
    """

    quantity: str
    samples: tuple[float, ...]
    sense: Sense
    bound: float

    @cached_property
    def interval(self) -> tuple[float, float]:
        return interval(self.samples)

    @property
    def mean(self) -> float:
        return sum(self.samples) / len(self.samples) if self.samples else math.nan

    @property
    def outcome(self) -> Outcome:
        low, high = self.interval
        if self.sense == "above":
            low, high = -high, -low
        bound = self.bound if self.sense == "below" else -self.bound
        if high <= bound:
            return Outcome.HOLDS
        return Outcome.FAILS if low > bound else Outcome.UNDECIDED

    def __str__(self) -> str:
        low, high = self.interval
        sign = "≤" if self.sense == "below" else "≥"
        return f"{self.quantity} {self.mean:.3g} [{low:.3g}, {high:.3g}], claimed {sign} {self.bound:g}"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and what was measured of it here.

    Args:
        key: short name, unique in the table.
        paper: arXiv number.
        section: where the paper says so; empty where that could not be looked up.
        text: what is claimed.
        run: what was run.
        comparisons: all of which have to hold.
        can_fail: whether it could have come out otherwise; an identity that the code has to satisfy cannot.
    """

    key: str
    paper: str
    section: str
    text: str
    run: str
    comparisons: tuple[Comparison, ...]
    can_fail: bool = True

    @property
    def outcome(self) -> Outcome:
        return together(comparison.outcome for comparison in self.comparisons)

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        return f"{self.outcome.value}: {self.text} ({'; '.join(map(str, self.comparisons))})"


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Of claims that are made at once: one that fails fails all; of nothing, nothing is decided."""
    found = set(outcomes)
    if Outcome.FAILS in found:
        return Outcome.FAILS
    return Outcome.HOLDS if found == {Outcome.HOLDS} else Outcome.UNDECIDED


EXIT_CODES = {Outcome.HOLDS: 0, Outcome.FAILS: 1, Outcome.UNDECIDED: 4}
"""Of a command that checked some claims; 2 and 3 are a user's mistake and a training run that cannot go on."""


def exit_code(claims: Iterable[Claim]) -> int:
    """0 where all claims hold, 1 where one does not, 4 where none fails but one is not decided."""
    return EXIT_CODES[together(claim.outcome for claim in claims)]


def compare(
    quantity: str, samples: Iterable[float], *, below: float | None = None, above: float | None = None
) -> Comparison:
    """A comparison of samples with one bound, from one side."""
    if (below is None) == (above is None):
        raise ValueError("exactly one of below and above")
    if below is not None:
        return Comparison(quantity, tuple(samples), "below", below)
    assert above is not None
    return Comparison(quantity, tuple(samples), "above", above)


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """`first - second`, run by run of the same seed; what both lost to infinity is no number."""
    return [a - b for a, b in zip(first, second, strict=True)]
