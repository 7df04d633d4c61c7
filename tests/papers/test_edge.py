"""The best value over the width: known optima, edges that decide nothing, and how often the interval is right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.papers.mup import claims
from hf_so2.papers.mup.curves import Curves, distance, growth, jackknife, optimum
from hf_so2.papers.verdict import Outcome, interval

STEPS = range(-4, 5)


def valley(best: float, noise: np.ndarray | None = None) -> dict[int, float]:
    """A parabola over the steps of a grid."""
    extra = np.zeros(len(STEPS)) if noise is None else noise
    return {step: 0.1 * (step - best) ** 2 + float(e) for step, e in zip(STEPS, extra, strict=True)}


@given(st.floats(-2.9, 2.9), st.integers(1, 5))
def test_the_least_of_a_parabola_is_found(best: float, seeds: int) -> None:
    found, on_edge = optimum([valley(best)] * seeds)
    assert found == pytest.approx(best, abs=1e-9)
    assert not on_edge


def test_the_least_of_a_cliff_is_within_a_step_of_the_best_tried() -> None:
    cliff = {-2: 1.0, -1: 0.5, 0: 0.2, 1: 0.1, 2: 9.0, 3: 9.0}
    assert abs(optimum([cliff])[0] - 1) <= 1


def test_an_edge_is_told() -> None:
    assert optimum([valley(4.6)]) == (4.0, True)
    assert optimum([valley(-7.0)]) == (-4.0, True)


def curves(shifts: list[float], narrow: float = 0.0) -> Curves:
    return {
        32: {seed: valley(narrow) for seed in range(len(shifts))},
        128: {seed: valley(shift) for seed, shift in enumerate(shifts)},
    }


def test_growth_is_that_of_the_mean_curves() -> None:
    assert growth(curves([1.5] * 4)) == pytest.approx([1.5] * 4)
    assert distance(curves([-1.5] * 4)) == pytest.approx([1.5] * 4)
    # Parabolas alike but for where they have their least: the least of their mean is the mean of those.
    assert growth(curves([1.0, 2.0, 0.3])) == pytest.approx([1.0, 2.0, 0.3])


def test_beyond_the_grid_it_moved_at_least_to_the_edge_and_from_an_edge_nothing_is_known() -> None:
    assert growth(curves([9.0] * 3)) == pytest.approx([4.0] * 3)
    assert all(math.isnan(value) for value in growth(curves([0.0] * 3, narrow=-9.0)))
    assert all(math.isnan(value) for value in distance(curves([0.0] * 3, narrow=-9.0)))
    for part in claims.within("shift", growth(curves([0.0] * 3, narrow=-9.0)), 1.0):
        assert part.outcome is Outcome.UNDECIDED


@pytest.mark.parametrize(("shift", "outcome"), [(0.05, "HOLDS"), (2.1, "FAILS"), (-2.1, "FAILS")])
def test_a_claim_of_transfer(shift: float, outcome: str) -> None:
    samples = growth(curves([shift, shift + 0.05, shift - 0.05]))
    assert claims.within("shift", samples, 1.0)[0].outcome is Outcome[outcome]


def test_the_jackknife_of_a_mean_is_the_samples_and_it_removes_bias() -> None:
    samples = [1.0, 4.0, 2.5, -3.0]
    assert jackknife(lambda seeds: sum(samples[s] for s in seeds) / len(seeds), range(4)) == pytest.approx(samples)
    # The variance with n below the line is biased, that with n - 1 is not (Quenouille 1956).
    biased = jackknife(lambda seeds: float(np.var([samples[s] for s in seeds])), range(4))
    assert np.mean(biased) == pytest.approx(np.var(samples, ddof=1))


def test_the_interval_of_a_growth_covers_it_about_as_often_as_it_says() -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        noise = 0.03 * rng.normal(size=(2, 5, len(STEPS)))
        made_up = {
            32: {seed: valley(0.2, noise[0, seed]) for seed in range(5)},
            128: {seed: valley(0.9, noise[1, seed]) for seed in range(5)},
        }
        low, high = interval(growth(made_up))
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / trials <= 1.0
