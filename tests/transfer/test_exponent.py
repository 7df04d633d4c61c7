"""Exponents of the best rate over width and depth, on made-up parabolas whose optimum and noise are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hf_so2.transfer.reporting.exponent import STILL, Exponent, Size, exponents
from hf_so2.transfer.reporting.report import SweepResult, write_report
from hf_so2.transfer.reporting.sizes import judge_sizes
from hf_so2.transfer.trials import Trial, finalists

RATE = "learning_rate"
GRID = tuple(0.06 * 2.0**power for power in range(-3, 4))
WIDTHS: list[Size] = [(64, None), (128, None), (256, None)]
BOTH: list[Size] = [(width, depth) for width in (64, 128) for depth in (2, 4, 8)]
CURVATURE = 0.05


def best_rate(size: Size, over_width: float, over_depth: float) -> float:
    width, depth = size
    return 0.06 * (width / 64) ** over_width * ((depth or 2) / 2) ** over_depth


def trials(
    sizes: Sequence[Size],
    over_width: float = 0.0,
    over_depth: float = 0.0,
    *,
    grid: Sequence[float] = GRID,
    seeds: int = 3,
    repeated: int = 3,
    noise: Callable[[], float] = lambda: 0.0,
) -> list[Trial]:
    """What a sweep runs: every rate once, the best ones with further seeds, each of which shifts all losses."""
    made: list[Trial] = []
    for width, depth in sizes:
        best = best_rate((width, depth), over_width, over_depth)

        def run(rate: float, seed: int, best: float = best, width: int = width, depth: int | None = depth) -> Trial:
            loss = 3 - 0.05 * math.log2(width) + CURVATURE * math.log2(rate / best) ** 2 + 0.03 * seed + noise()
            return Trial("kfac_mup", width, {RATE: rate}, seed, loss, depth=depth)

        first = [run(rate, 0) for rate in grid]
        made += first
        chosen = finalists(first, repeated)
        made += [run(setting.params[RATE], seed) for setting in chosen for seed in range(1, seeds)]
    return made


@pytest.mark.parametrize(("over_width", "over_depth"), [(0.0, 0.0), (0.4, -0.2), (-0.3, 0.1)])
def test_known_exponents_are_found_exactly(over_width: float, over_depth: float) -> None:
    found = exponents(trials(BOTH, over_width, over_depth), RATE)
    assert [(e.axis, e.first, e.last) for e in found] == [("width", 64, 128), ("depth", 2, 8)]
    assert [e.value for e in found] == pytest.approx([over_width, over_depth], abs=1e-6)
    (alone,) = exponents(trials(WIDTHS, over_width), RATE)
    assert (alone.axis, alone.value) == ("width", pytest.approx(over_width, abs=1e-6))


@pytest.mark.parametrize(("sizes", "truth"), [(WIDTHS, (0.1,)), (BOTH, (0.1, -0.1))])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(sizes: list[Size], truth: tuple[float, ...]) -> None:
    generator = np.random.default_rng(3)
    covered = np.zeros(len(truth))
    for _ in range(80):
        found = exponents(trials(sizes, 0.1, -0.1, noise=lambda: generator.normal(0, 0.006)), RATE)
        covered += [e.low <= exponent <= e.high for e, exponent in zip(found, truth, strict=True)]
    assert all(68 <= count <= 79 for count in covered)  # 76 are expected, four standard deviations down


def test_without_curvature_in_question_it_is_students_interval() -> None:
    """Small noise: the vertex is linear in the losses, so the exponent's interval is that of a linear model."""
    generator = np.random.default_rng(0)
    grid = (0.03, 0.06, 0.12)
    made = trials(WIDTHS[:2], grid=grid, noise=lambda: generator.normal(0, 1e-4))
    (found,) = exponents(made, RATE)
    tables = [
        np.array([[t.loss for t in made if t.width == width and t.seed == seed] for seed in range(3)])
        for width in (64, 128)
    ]
    order = [[t.params[RATE] for t in made if t.width == width and t.seed == 1] for width in (64, 128)]
    for table, rates in zip(tables, order, strict=True):  # later seeds come best first
        table[1:] = table[1:][:, np.argsort(rates)]
    residual = [t - t.mean(0) - t.mean(1, keepdims=True) + t.mean() for t in tables]
    deviation = math.sqrt(sum(float((r**2).sum()) for r in residual) / 8)
    # Slope of a parabola through x = -1, 0, 1, three seeds each: variance σ² / 6; two widths, one doubling apart.
    half = 2.306 * deviation * math.sqrt(2 / 6) / (2 * CURVATURE)  # Student's quantile for 8 degrees of freedom
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)  # 4,000 draws
    slopes = [(table.mean(0)[2] - table.mean(0)[0]) / 2 for table in tables]
    bends = [(table.mean(0)[2] - 2 * table.mean(0)[1] + table.mean(0)[0]) / 2 for table in tables]
    vertices = [-slope / (2 * bend) for slope, bend in zip(slopes, bends, strict=True)]
    assert found.value == pytest.approx(vertices[1] - vertices[0], rel=1e-6)


def test_scaled_rates_shifted_losses_and_the_order_of_proxies_change_nothing() -> None:
    generator = np.random.default_rng(1)
    made = trials(BOTH, 0.2, 0.1, noise=lambda: generator.normal(0, 0.004))
    expected = exponents(made, RATE)

    def changed(scale: float, shift: float, unit: int) -> list[Trial]:
        return [
            Trial("k", t.width * unit, {RATE: t.params[RATE] * scale}, t.seed, t.loss + shift, depth=t.depth)
            for t in made
        ]

    for other in (changed(4.0, 0.0, 1), changed(1.7, 0.0, 1), changed(1.0, 5.0, 1), changed(1.0, 0.0, 3)):
        for ours, theirs in zip(exponents(other, RATE), expected, strict=True):
            assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-6)
    later_first = sorted(made, key=lambda t: (-t.width, t.seed))
    assert [e.value for e in exponents(later_first, RATE)] == pytest.approx([e.value for e in expected])


def test_more_seeds_make_it_surer() -> None:
    def length(seeds: int) -> float:
        generator = np.random.default_rng(2)
        (found,) = exponents(trials(WIDTHS, seeds=seeds, noise=lambda: generator.normal(0, 0.01)), RATE)
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert length(8) < length(3)


def test_axes_that_cannot_be_told_apart_and_single_sizes_have_no_exponent() -> None:
    assert exponents(trials([(64, 2), (128, 4), (256, 8)]), RATE) == ()
    assert exponents(trials([(64, None)]), RATE) == ()
    assert exponents([Trial("k", 64, {"damping": 1.0}, 0, 3.0), Trial("k", 128, {"damping": 1.0}, 0, 3.0)], RATE) == ()


@pytest.mark.parametrize(
    ("low", "high", "answer", "words"),
    [
        (
            -0.06,
            0.14,
            "still",
            "stands still over width 64 to 256: exponent +0.04 [-0.06, 0.14]; reuse 0.2 in the wide",
        ),
        (0.3, 0.5, "moves", "moves over width 64 to 256: exponent +0.40 [0.30, 0.50]; tune at a width nearer to the"),
        (-0.5, -0.3, "moves", "or pass --learning_rate=0.35 at width 1024."),
        (-0.1, 0.5, "undecided", "[-0.10, 0.50] holds both"),
        (
            None,
            None,
            "unknown",
            "Not decided over width 64 to 256: exponent +0.20, and how sure that is cannot be said",
        ),
    ],
)
def test_the_answer_in_words(low: float | None, high: float | None, answer: str, words: str) -> None:
    value = 0.2 if low is None or high is None else (low + high) / 2
    exponent = Exponent("width", 64, 256, value, low, high)
    assert exponent.answer == answer
    assert words in exponent.sentence(0.2, (1024, 0.351))


def test_half_a_grid_step_at_four_times_the_size_counts_as_still() -> None:
    assert math.isclose(4**STILL, math.sqrt(2))


def test_a_rate_that_stands_over_both_transfers() -> None:
    found = judge_sizes(trials(BOTH), BOTH)
    assert found.transfers
    assert "from width 64 to 128" in found.sentence
    assert "from depth 2 to 8" in found.sentence
    assert [exponent.answer for exponent in found.exponents] == ["still", "still"]
    assert "reuse 0.06 in the deep model" in found.answers[1]
    assert set(found.grid[RATE]) == {f"{width}×{depth}" for width, depth in BOTH}
    assert found.depth is not None
    assert set(found.depth.losses) == {2, 4, 8}
    assert set(found.losses) == {64, 128}


def test_a_rate_that_moves_over_the_depth_does_not_transfer_and_the_width_still_stands() -> None:
    found = judge_sizes(trials(BOTH, 0.0, -0.75), BOTH)
    assert not found.transfers
    assert found.sentence.startswith("Not confirmed at width 128: the best learning rate drifts by a factor of 0.35")
    assert "from depth 2 to 8" in found.sentence
    assert [exponent.answer for exponent in found.exponents] == ["still", "moves"]
    # Eight layers have 0.06 / 4^0.75 = 0.0212, four times as many 0.0075.
    assert "--learning_rate=0.0075 at depth 32" in found.answers[1]


def test_a_single_width_is_judged_over_its_depths() -> None:
    sizes: list[Size] = [(64, 2), (64, 4), (64, 8)]
    found = judge_sizes(trials(sizes), sizes)
    assert found.transfers
    assert "one width only" not in found.sentence
    assert [exponent.axis for exponent in found.exponents] == ["depth"]
    one: list[Size] = [(64, 2)]
    assert "one width only" in judge_sizes(trials(one), one).sentence


def test_a_pair_that_was_not_tried_enough_keeps_the_verdict_from_yes() -> None:
    made = [t for t in trials(BOTH) if (t.width, t.depth) != (64, 2) or t.params[RATE] in GRID[:3]]
    found = judge_sizes(made, BOTH)
    assert not found.transfers
    assert "too few trials" in found.sentence


def test_without_repetitions_nothing_is_decided() -> None:
    found = judge_sizes(trials(WIDTHS, seeds=1), WIDTHS)
    assert [exponent.answer for exponent in found.exponents] == ["unknown"]
    assert "--seeds" in found.answers[0]


def test_the_report_draws_a_curve_for_every_depth(tmp_path: Path) -> None:
    made = trials(BOTH, 0.0, 0.1)
    result = SweepResult(made, judge_sizes(made, BOTH), sampled=False)
    source = {"command": "", "date": "", "versions": {}}
    write_report({"kfac_mup": result}, tmp_path, source=source, recipe="", check=None)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert html.count("data:image/png;base64,") == 4
    assert "optima by width × depth" in html
    assert "64×8" in html
    assert "Loss against learning rate, width 128" in html
    assert result.verdict.answers[1] in html.replace("&#39;", "'")
    for name in ("sweep_depth.png", "depths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
