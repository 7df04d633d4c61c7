"""What made-up trials say: parabolas whose optimum is known, and every way in which transfer fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.transfer.reporting.optimum import find_optimum
from hf_so2.transfer.reporting.report import SweepResult, _points
from hf_so2.transfer.reporting.verdict import Verdict, judge, predicted_loss, predicted_rate
from hf_so2.transfer.trials import Trial, best_setting, finalists, profile, seed_noise, without_seed_effects

GRID = (0.015, 0.03, 0.06, 0.12, 0.24)


def parabola(best: float, least: float = 3.0, curvature: float = 0.05) -> Callable[[float], float]:
    return lambda value: least + curvature * math.log2(value / best) ** 2


def trials(
    losses: dict[int, Callable[[float], float]], values: Sequence[float] = GRID, seeds: Iterable[int] = (0,)
) -> list[Trial]:
    return [
        Trial("kfac_mup", width, {"learning_rate": value}, seed, loss(value))
        for seed in seeds
        for width, loss in losses.items()
        for value in values
    ]


def verdict(optima: dict[int, float], **changes: object) -> Verdict:
    """Of proxies whose best learning rates are known and whose loss falls with the width."""
    made = trials({width: parabola(best, 3.0 - 0.05 * math.log2(width)) for width, best in optima.items()}, **changes)
    return judge(made, list(optima))


@given(
    best=st.floats(0.03, 0.12),
    curvature=st.floats(0.01, 0.5),
    least=st.floats(1.0, 8.0),
)
def test_the_least_of_a_parabola_is_found_exactly(best: float, curvature: float, least: float) -> None:
    curve = {value: parabola(best, least, curvature)(value) for value in GRID}
    optimum = find_optimum(curve)
    assert optimum is not None
    assert optimum.value == pytest.approx(best, rel=1e-4)
    assert optimum.loss == pytest.approx(least, rel=1e-6)
    assert optimum.loss_at(0.05) == pytest.approx(parabola(best, least, curvature)(0.05), rel=1e-6)
    assert optimum.low <= optimum.value * 1.001
    assert optimum.high >= optimum.value / 1.001
    assert optimum.tested == min(curve, key=curve.__getitem__)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        curve = {value: parabola(0.06)(value) + generator.normal(0, 0.01) for value in GRID}
        optimum = find_optimum(curve, noise=0.01)
        assert optimum is not None
        covered += optimum.low <= 0.06 <= optimum.high
    assert 170 <= covered <= 198  # 90 % of 200, give or take four standard deviations


def test_far_values_do_not_bend_the_fit() -> None:
    curve = {value: parabola(0.06)(value) for value in GRID} | {0.48: 9.0, 0.96: math.inf, 0.001: 8.0}
    optimum = find_optimum(curve)
    assert optimum is not None
    assert optimum.value == pytest.approx(0.06, rel=1e-4)


def test_a_cliff_beside_the_least_does_not_push_it_away() -> None:
    """AdamW as measured at width 128: a plain parabola through the five has its least at 0.0027."""
    curve = {0.001: 3.287, 0.002: 3.229, 0.004: 3.205, 0.008: 3.171, 0.016: 4.402}
    a, b, _ = np.polyfit(np.log2(list(curve)), list(curve.values()), 2)
    assert 2 ** (-b / (2 * a)) < 0.003
    optimum = find_optimum(curve)
    assert optimum is not None
    assert 0.004 < optimum.value < 0.016
    assert optimum.low <= optimum.value <= optimum.high


@pytest.mark.parametrize(("optim", "transfers"), [("adamw_mup", True), ("adamw", False)])
def test_measured_runs_transfer_with_mup_and_not_without(optim: str, transfers: bool) -> None:
    """The runs behind docs/measurements/results.md, where the optimum falls by two grid steps without μP."""
    measured = []
    for line in (Path(__file__).parents[2] / "docs/results/transfer.jsonl").read_text("utf-8").splitlines():
        run = json.loads(line)
        flags, loss = run["flags"], run["metrics"]["eval_loss"]
        if flags["optim"] == optim and flags.get("fallback_learning_rate") == "0.04":
            rate = {"learning_rate": float(flags["learning_rate"])}
            measured.append(Trial(optim, int(flags["width"]), rate, 0, math.inf if loss is None else loss))
    found = judge(measured, [64, 128, 256])
    assert found.transfers is transfers
    assert ("drifts" in found.sentence) is not transfers


@pytest.mark.parametrize(
    ("losses", "edge", "value"),
    [
        ([3.0, 2.0, 1.0], "high", 4.0),
        ([1.0, 2.0, 3.0], "low", 1.0),
        ([3.0, 2.0, math.inf], "", 2.0),  # a diverged run bounds the optimum
        ([1.0, 1.0, 1.0], "low", 1.0),
    ],
)
def test_where_no_parabola_fits_the_best_tried_value_stands(losses: list[float], edge: str, value: float) -> None:
    optimum = find_optimum(dict(zip([1.0, 2.0, 4.0], losses, strict=True)))
    assert optimum is not None
    assert (optimum.edge, optimum.value, optimum.coefficients) == (edge, value, ())


def test_nothing_finite_has_no_optimum() -> None:
    assert find_optimum({1.0: math.inf}) is None


def test_a_stable_optimum_transfers() -> None:
    found = verdict({64: 0.06, 128: 0.065}, seeds=(0, 1))
    assert found.transfers
    assert found.drift is not None
    assert found.drift[0] == pytest.approx(0.065 / 0.06, rel=1e-3)
    assert found.best is not None
    assert found.best.params == {"learning_rate": 0.06}
    assert "width 64 to 128" in found.sentence
    assert "sure at 90 %" in found.sentence
    assert not found.edges


def test_without_repetitions_it_does_not_say_how_sure() -> None:
    assert "How sure this is cannot be said" in verdict({64: 0.06, 128: 0.06}).sentence


@pytest.mark.parametrize(
    ("optima", "changes", "problem", "advice"),
    [
        ({64: 0.06}, {}, "one width only", "second proxy"),
        ({64: 0.06, 128: 0.5}, {}, "highest that was tried", "--extend"),
        ({64: 0.001, 128: 0.06}, {}, "lowest that was tried", "--extend"),
        ({64: 0.03, 128: 0.12}, {}, "drifts by a factor of 4", "wider proxy"),
        ({64: 0.12, 128: 0.03}, {}, "drifts by a factor of 0.25", "wider proxy"),
        ({64: 0.06, 128: 0.06}, {"values": GRID[1:4]}, "too few trials: 3 learning rates finished", "--trials"),
    ],
)
def test_it_says_no(optima: dict[int, float], changes: dict[str, object], problem: str, advice: str) -> None:
    found = verdict(optima, **changes)
    assert not found.transfers
    assert found.sentence.startswith("Not confirmed: ")
    assert problem in found.sentence
    assert advice in found.advice


def test_no_when_the_wider_proxy_is_no_better() -> None:
    found = judge(trials({64: parabola(0.06, 3.0), 128: parabola(0.06, 3.1)}), [64, 128])
    assert not found.transfers
    assert "no better" in found.sentence


def test_no_when_a_width_has_nothing_or_nothing_finished() -> None:
    assert "no trial finished at width 128" in judge(trials({64: parabola(0.06)}), [64, 128]).sentence
    diverged = [Trial("kfac", 64, {"learning_rate": 1.0}, 0, math.inf, "diverged")]
    found = judge(diverged, [64])
    assert not found.transfers
    assert found.best is None


def test_an_edge_of_damping_counts_only_beyond_the_noise() -> None:
    def made(slope: float) -> list[Trial]:
        return [
            Trial(
                "kfac_mup",
                width,
                {"learning_rate": rate, "damping": damping},
                seed,
                parabola(0.06, 3.0 - width / 1000)(rate) + slope * math.log10(damping) + 0.01 * (index % 2) * seed,
            )
            for width in (64, 128)
            for index, rate in enumerate(GRID)
            for damping in (1e-4, 1e-3, 1e-2)
            for seed in (0, 1)
        ]

    flat, steep = judge(made(0.0001), [64, 128]), judge(made(0.1), [64, 128])
    assert flat.transfers
    assert steep.edges == (("damping", "low"),)
    assert not steep.transfers


def test_seed_effects_are_taken_out_before_settings_are_compared() -> None:
    """The finalists' second seed is 0.3 better for all: the curve through means would dip at them."""
    first = trials({64: parabola(0.05)})
    repeated = [Trial("kfac_mup", 64, t.params, 1, t.loss - 0.3) for t in first if t.params["learning_rate"] > 0.05]
    curve = profile(without_seed_effects(first + repeated), "learning_rate")
    for value, loss in curve.items():
        assert loss == pytest.approx(parabola(0.05)(value))
    noise = seed_noise(first + repeated)
    assert noise == pytest.approx(0.0, abs=1e-12)
    assert seed_noise(first) is None


def test_noise_is_what_a_two_way_table_leaves_over() -> None:
    """Against the residual variance of settings × seeds by least squares in NumPy."""
    generator = np.random.default_rng(0)
    table = generator.normal(3.0, 0.02, (3, 2))
    made = [
        Trial("kfac", 64, {"learning_rate": rate}, seed, float(table[row, seed]))
        for seed in (0, 1)
        for row, rate in enumerate((0.03, 0.06, 0.12))
    ]
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert seed_noise(made) == pytest.approx(math.sqrt((residual**2).sum() / 2))


def test_finalists_are_chosen_by_the_first_seed_and_the_best_by_all() -> None:
    made = [Trial("kfac", 64, {"learning_rate": rate}, 0, loss) for rate, loss in ((1, 3.0), (2, 3.1), (3, math.inf))]
    assert [setting.params["learning_rate"] for setting in finalists(made, 3)] == [1, 2]
    repeated = [Trial("kfac", 64, {"learning_rate": rate}, 1, loss) for rate, loss in ((1, 3.4), (2, 3.1))]
    lucky = [Trial("kfac", 64, {"learning_rate": 4}, 0, 2.9)]
    best = best_setting(made + repeated + lucky)
    assert best is not None
    assert best.params == {"learning_rate": 2}


@given(st.floats(1.0, 5.0), st.floats(0.001, 1.0), st.integers(1, 4))
def test_the_forecast_is_between_no_gain_and_the_last_gain_kept_up(loss: float, gain: float, doublings: int) -> None:
    bounds = predicted_loss({64: loss + gain, 128: loss}, 128 * 2**doublings)
    assert bounds == pytest.approx((loss - gain * doublings, loss))


@pytest.mark.parametrize("losses", [{}, {64: 3.0}, {64: 3.0, 128: 3.0}, {64: 3.0, 128: 3.1}])
def test_no_forecast_from_one_proxy_or_from_no_gain(losses: dict[int, float]) -> None:
    assert predicted_loss(losses, 512) is None


@given(best=st.floats(0.05, 0.08), exponent=st.floats(-0.4, 0.4), doublings=st.integers(0, 4))
def test_the_drift_of_the_best_rate_is_kept_up(best: float, exponent: float, doublings: int) -> None:
    optima = verdict({64: best, 128: best * 2**exponent}).optima["learning_rate"]
    found = predicted_rate(optima, 128 * 2**doublings)
    assert found == pytest.approx((best * 2**exponent, best * 2 ** (exponent * (doublings + 1))), rel=1e-3)


def test_no_rate_is_predicted_from_one_proxy() -> None:
    assert predicted_rate(verdict({64: 0.06}).optima["learning_rate"], 512) is None


@pytest.mark.parametrize(("drift", "advised"), [(1.0, False), (1.3, True)])
def test_a_sure_drift_is_named_in_the_advice(drift: float, advised: bool) -> None:
    found = verdict({64: 0.06, 128: 0.06 * drift}, seeds=(0, 1))
    assert found.transfers
    assert ("best rate at width 512 is 0.13," in found.advice) is advised


def test_the_report_draws_losses_at_the_level_of_the_first_seed_as_it_fits_them() -> None:
    # The second seed is better by 0.3 everywhere, but was run at the best value only.
    made = [*trials({64: parabola(0.06)}), Trial("kfac_mup", 64, {"learning_rate": 0.06}, 1, 2.7)]
    drawn = _points(SweepResult(made, judge(made, [64]), sampled=False), "learning_rate")
    assert drawn == pytest.approx({(f"{value:g}", "64"): parabola(0.06)(value) for value in GRID})
