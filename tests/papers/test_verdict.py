"""The verdicts on made-up runs: "no" and "not decided" where that is what the numbers say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_so2.papers.verdict import Claim, Outcome, compare, differences, exit_code, interval, together

INF = math.inf


def claim(*comparisons) -> Claim:
    return Claim("made-up", "0000.00000", "", "it is so", "nothing", comparisons)


@pytest.mark.parametrize(
    ("samples", "outcome"),
    [
        ([0.10, 0.12, 0.11], Outcome.HOLDS),
        ([0.90, 0.92, 0.91], Outcome.FAILS),
        ([0.10, 0.90, 0.45], Outcome.UNDECIDED),  # the mean is below the bound, and nobody knows how far
        ([0.10, 0.12], Outcome.UNDECIDED),  # too few
        ([0.10], Outcome.UNDECIDED),
        ([], Outcome.UNDECIDED),
        ([INF, INF, INF], Outcome.FAILS),  # all diverged
        ([0.10, 0.12, INF], Outcome.UNDECIDED),  # one of three did
        ([-INF, INF, 0.0], Outcome.UNDECIDED),
        ([0.10, 0.12, math.nan], Outcome.UNDECIDED),
        ([0.5, 0.5, 0.5], Outcome.HOLDS),  # the bound itself belongs to the claim
    ],
)
def test_below(samples: list[float], outcome: Outcome) -> None:
    assert compare("x", samples, below=0.5).outcome is outcome
    mirrored = compare("x", [-value for value in samples], above=-0.5)
    assert mirrored.outcome is outcome


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 0.3 <= high for low, high in (interval(list(rng.normal(0.3, 1, 5))) for _ in range(2000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_noise_is_decided_wrongly_at_most_as_often_as_the_confidence_allows() -> None:
    """Two methods that are the same: neither "better" nor "worse" in more than one of 20 tables."""
    rng = np.random.default_rng(1)
    outcomes = [compare("difference", rng.normal(0, 1, 5), below=0.0).outcome for _ in range(1000)]
    assert sum(outcome is not Outcome.UNDECIDED for outcome in outcomes) < 70


def test_a_claim_of_several_parts() -> None:
    yes, no = compare("a", [0.1, 0.11, 0.12], below=1.0), compare("b", [3.0, 3.1, 3.2], below=1.0)
    perhaps = compare("c", [0.0, 2.1, 0.5], below=1.0)
    assert claim(yes).outcome is Outcome.HOLDS
    assert claim(yes, perhaps).outcome is Outcome.UNDECIDED
    assert claim(yes, perhaps, no).outcome is Outcome.FAILS
    assert claim().outcome is Outcome.UNDECIDED
    assert together([]) is Outcome.UNDECIDED


def test_exit_codes() -> None:
    yes, no = claim(compare("a", [0.0] * 3, below=1.0)), claim(compare("a", [2.0] * 3, below=1.0))
    perhaps = claim(compare("a", [0.0], below=1.0))
    assert exit_code([yes, yes]) == 0
    assert exit_code([yes, no, perhaps]) == 1
    assert exit_code([yes, perhaps]) == 4


def test_the_sentence_says_the_outcome_and_the_numbers() -> None:
    sentence = claim(compare("loss", [1.0, 1.1, 1.2], below=0.5)).sentence
    assert sentence.startswith("does not hold: it is so")
    assert "1.1 [" in sentence
    assert "≤ 0.5" in sentence


def test_pairs_that_both_diverged_say_nothing() -> None:
    assert math.isnan(differences([INF, 1.0], [INF, 2.0])[0])
    assert differences([INF, 1.0], [1.0, 2.0]) == [INF, -1.0]


def test_one_bound_from_one_side() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        compare("x", [1.0], below=1.0, above=0.0)
