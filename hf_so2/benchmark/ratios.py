"""Statistics of step times: ratios of pairs that were measured together, percentiles, exponents of growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


def paired_ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Spread of `seconds / baseline`, element by element.

    Other programs slow a shared machine for minutes at a time. Both members of a pair are measured within seconds of
    each other, so that their ratio hardly notices, where a ratio of means would.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    if not seconds:
        raise ValueError("no pair to take a ratio of")
    pairs = zip(seconds, baseline, strict=True)
    lower, median, upper = np.percentile([own / other for own, other in pairs], [25, 50, 75])
    return Spread(float(median), float(lower), float(upper))


def fitted_exponent(values: Mapping[int, float]) -> float:
    """The `b` of the least-squares fit `value = a · size^b` on logarithmic axes; NaN where a value is not positive.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(values) < 2:
        raise ValueError("an exponent needs two sizes")
    if min(values.values()) <= 0:
        return float("nan")
    slope, _ = np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)
    return float(slope)
