"""Does a setting found on proxies hold for a wider model? A pure function of the trials, which can say no."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hf_so2.transfer.reporting.exponent import LARGE, LARGER, Axis, Exponent
from hf_so2.transfer.reporting.optimum import Edge, Optimum, find_optimum
from hf_so2.transfer.trials import Setting, Trial, best_setting, profile, seed_noise, without_seed_effects

RATE = "learning_rate"
LARGEST_DRIFT = 2.0
"""Factor between the optima of the narrowest and the widest proxy that still counts as the same: one grid step."""
FEWEST_VALUES = 4
"""Different learning rates that must have finished at a width before anything is said about its optimum."""
BINS_PER_OCTAVE = 2  # of sampled values, for curves
WIDER = 4  # times the widest proxy: the width that figures reach to and that advice on a drift is given for


@dataclass(frozen=True)
class Verdict:
    """What the trials of one optimizer say on proxies that differ in width; where `axis` says so, in depth.

    Args:
        transfers: whether the setting may be used on a wider model as it stands.
        sentence: the answer in words, with how sure it is.
        advice: what to do next.
        best: the best setting at the widest proxy; None when nothing finished there.
        optima: by flag and width.
        edges: (flag, side) of optima on the edge of what was tried.
        losses: loss of `best` by width, where it was run; the mean over seeds, at the level of the first one.
        noise: standard deviation of a loss beyond what its seed does to all settings; None without repetitions.
        drift: factor between the optimal learning rates of the widest and the narrowest proxy, and its interval.
        axis: in what the proxies differ.
        depth: the same over the depth, of the widest proxies; None where depths were not asked for.
        exponents: of the best learning rate over width and depth.
        answers: what they mean, a sentence each.
        grid: optima by flag and size (`64×8`) of proxies that differ in both.
    """

    transfers: bool
    sentence: str
    advice: str
    best: Setting | None
    optima: Mapping[str, Mapping[int, Optimum]]
    edges: tuple[tuple[str, Edge], ...]
    losses: Mapping[int, float]
    noise: float | None
    drift: tuple[float, float, float] | None
    axis: Axis = "width"
    depth: Verdict | None = None
    exponents: tuple[Exponent, ...] = ()
    answers: tuple[str, ...] = ()
    grid: Mapping[str, Mapping[str, Optimum]] = field(default_factory=dict)


def judge(
    trials: Iterable[Trial],
    widths: Sequence[int],
    *,
    sampled: bool = False,
    axis: Axis = "width",
    noise: float | None = None,
) -> Verdict:
    """The verdict on one optimizer's trials with proxies that differ in one thing.

    It is no when a learning rate was searched at fewer than two widths, when a width has too few finished values, when
    an optimum lies on the edge of what was tried, when the optimal learning rate drifts by more than a factor of two,
    or when the wider proxy is worse.

    Args:
        trials: of one optimizer, at all widths and one depth; or at all depths and one width.
        widths: hidden sizes of the proxies that were asked for; or their depths.
        sampled: whether values came from ranges rather than from a grid.
        axis: in what the proxies differ.
        noise: as in :class:`Verdict`, if more trials than these tell it.
    """
    trials, widths = list(trials), sorted(widths)
    noise = seed_noise(trials) if noise is None else noise
    by_width = {width: without_seed_effects(t for t in trials if getattr(t, axis) == width) for width in widths}
    names = sorted({name for trial in trials for name in trial.params})
    curves = {
        name: {
            width: profile(group, name, per_octave=BINS_PER_OCTAVE if sampled else None)
            for width, group in by_width.items()
        }
        for name in names
    }
    optima = {
        name: {width: optimum for width, curve in by.items() if (optimum := find_optimum(curve, noise))}
        for name, by in curves.items()
    }
    best = best_setting(by_width[widths[-1]])
    losses = _losses_of(best, by_width)
    edges = _edges(curves, optima, noise)
    drift = _drift(optima.get(RATE, {}))
    problem, advice = _problem(optima.get(RATE, {}), widths, edges, drift, losses, noise, axis)
    if problem:
        sentence = f"Not confirmed: {problem}."
    else:
        sentence, advice = _confirmation(widths, drift, noise, axis)
        advice += _drift_kept_up(optima.get(RATE, {}), drift, axis)
    return Verdict(not problem, sentence, advice, best, optima, edges, losses, noise, drift, axis)


def predicted_loss(losses: Mapping[int, float], width: int) -> tuple[float, float] | None:
    """Bounds of the loss at a larger width, from the losses of one setting at the proxies.

    From below the last gain per doubling of the width, kept up; from above no further gain. None for fewer than two
    proxies, or where the wider one was not better: then nothing can be said.
    """
    widths = sorted(losses)
    if len(widths) < 2 or width < widths[-1]:
        return None
    narrow, wide = widths[-2:]
    gain = (losses[narrow] - losses[wide]) / math.log2(wide / narrow)
    if not gain > 0:
        return None
    return losses[wide] - gain * math.log2(width / wide), losses[wide]


def predicted_rate(optima: Mapping[int, Optimum], width: int) -> tuple[float, float] | None:
    """Range of the best learning rate at a larger width, from the fitted optima at the proxies, in no order.

    One end is the optimum of the widest proxy, the other goes on from there with the drift per doubling of the width
    between the widest two. None for fewer than two proxies, or where one has no fitted optimum.
    """
    widths = sorted(optima)
    if len(widths) < 2 or width < widths[-1] or not all(optima[w].coefficients for w in widths[-2:]):
        return None
    narrow, wide = widths[-2:]
    drift = math.log2(optima[wide].value / optima[narrow].value) / math.log2(wide / narrow)
    return optima[wide].value, optima[wide].value * 2.0 ** (drift * math.log2(width / wide))


def _losses_of(setting: Setting | None, by_width: Mapping[int, list[Trial]]) -> dict[int, float]:
    losses = {}
    for width, group in by_width.items():
        same = [t.loss for t in group if setting is not None and dict(t.params) == dict(setting.params)]
        if same and math.isfinite(sum(same)):
            losses[width] = sum(same) / len(same)
    return losses


def _edges(
    curves: Mapping[str, Mapping[int, Mapping[float, float]]],
    optima: Mapping[str, Mapping[int, Optimum]],
    noise: float | None,
) -> tuple[tuple[str, Edge], ...]:
    """Edges that matter: any of the learning rate's; another's where the next value is worse beyond the noise.

    0 is the natural end of a weight decay, and a flag that was held at one value has no edge.
    """
    found: dict[tuple[str, Edge], None] = {}
    for name, by_width in optima.items():
        for width, optimum in by_width.items():
            curve = curves[name][width]
            if not optimum.edge or len(curve) < 2 or optimum.tested <= 0:
                continue
            neighbour = list(curve)[1 if optimum.edge == "low" else -2]
            if name == RATE or curve[neighbour] - curve[optimum.tested] > 2 * (noise or 0.0):
                found[name, optimum.edge] = None
    return tuple(found)


def _drift(optima: Mapping[int, Optimum]) -> tuple[float, float, float] | None:
    """Widest over narrowest optimum, and its interval: half-widths of both in logarithms, added in quadrature."""
    if len(optima) < 2:
        return None
    first, last = optima[min(optima)], optima[max(optima)]
    middle = math.log2(last.value / first.value)
    below = math.hypot(math.log2(last.value / last.low), math.log2(first.high / first.value))
    above = math.hypot(math.log2(last.high / last.value), math.log2(first.value / first.low))
    return 2.0**middle, 2.0 ** (middle - below), 2.0 ** (middle + above)


def _problem(
    optima: Mapping[int, Optimum],
    widths: Sequence[int],
    edges: Sequence[tuple[str, Edge]],
    drift: tuple[float, float, float] | None,
    losses: Mapping[int, float],
    noise: float | None,
    axis: Axis,
) -> tuple[str, str]:
    """What keeps the verdict from being yes, and what to do about it; empty when nothing does."""
    missing = [width for width in widths if width not in optima]
    if len(missing) == len(widths):
        return "no trial finished with a learning rate that was searched", "Search learning_rate, among smaller values."
    if missing:
        return f"no trial finished at {axis} {missing[0]}", "Raise --trials or --minutes, or search smaller values."
    few = [width for width in widths if optima[width].points < FEWEST_VALUES]
    if few:
        values = optima[few[0]].points
        problem = f"too few trials: {values} learning rates finished at {axis} {few[0]}, {FEWEST_VALUES} are needed"
        return problem, "Raise --trials or --minutes and run the same command again."
    if edges:
        name, side = edges[0]
        word = "lowest" if side == "low" else "highest"
        problem = f"the best {name} is the {word} that was tried, so the optimum may lie beyond it"
        return problem, "Run the same command again with --extend, or with wider ranges."
    if len(widths) < 2:
        problem = f"one {axis} only: whether the optimum stays when the {axis} grows cannot be judged"
        return problem, f"Add a second proxy, twice as {LARGE[axis]}."
    assert drift is not None
    if not 1 / LARGEST_DRIFT <= drift[0] <= LARGEST_DRIFT:
        problem = (
            f"the best learning rate drifts by a factor of {drift[0]:.2g} from {axis} {widths[0]} to {widths[-1]}"
            f" (90 % interval {drift[1]:.2g} to {drift[2]:.2g})"
        )
        return problem, (
            f"Add a {LARGER[axis]} proxy and see whether the drift goes on, and look at the coordinate check; without"
            " _mup a drift is what theory expects."
        )
    # A deeper model that is no better is worth knowing, but its best rate stands where it stands.
    worse = losses.get(widths[0], math.inf) < losses.get(widths[-1], math.inf) - 2 * (noise or 0.0)
    if axis == "width" and worse:
        problem = f"at the setting found, width {widths[-1]} ends no better than width {widths[0]}"
        return problem, "Train longer or on more data: the proxies are not limited by their width."
    return "", ""


def _drift_kept_up(optima: Mapping[int, Optimum], drift: tuple[float, float, float] | None, axis: Axis) -> str:
    """What to try beside the recipe where the optimum drifts little, but surely; else empty."""
    assert drift is not None
    _, low, high = drift
    target = WIDER * max(optima)
    rates = predicted_rate(optima, target)
    if rates is None or low <= 1 <= high:
        return ""
    return (
        f" The drift is small but no noise: kept up, the best rate at {axis} {target} is {rates[1]:.2g}, so if you can"
        " afford a second run there, give it that."
    )


def _confirmation(
    widths: Sequence[int], drift: tuple[float, float, float] | None, noise: float | None, axis: Axis
) -> tuple[str, str]:
    assert drift is not None
    factor, low, high = drift
    settled = low >= 1 / LARGEST_DRIFT and high <= LARGEST_DRIFT
    how_sure = (
        "This is sure at 90 %"
        if settled and noise is not None
        else "This is likely, though the interval reaches beyond a factor of 2"
        if noise is not None
        else "How sure this is cannot be said: no setting was repeated with another seed"
    )
    sentence = (
        f"It transfers: from {axis} {widths[0]} to {widths[-1]} the best learning rate changes by a factor of"
        f" {factor:.2g} (90 % interval {low:.2g} to {high:.2g}). {how_sure}."
    )
    advice = f"Train the {LARGE[axis]} model with the recipe."
    if not settled:
        advice += f" For more certainty add a {LARGER[axis]} proxy, or raise --seeds."
    return sentence, advice
