"""The verdict on proxies that differ in width, in depth, or in both: lines of them, one by one, and exponents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hf_so2.transfer.reporting.exponent import Axis, Exponent, Size, exponents
from hf_so2.transfer.reporting.optimum import Optimum
from hf_so2.transfer.reporting.verdict import (
    BINS_PER_OCTAVE,
    RATE,
    WIDER,
    Verdict,
    judge,
    predicted_rate,
)
from hf_so2.transfer.trials import Trial, seed_noise


def judge_sizes(trials: Iterable[Trial], sizes: Sequence[Size], *, sampled: bool = False) -> Verdict:
    """The verdict on one optimizer's trials with proxies of these widths and depths.

    It is yes when it is yes along every line of proxies that differ in one thing, be it width or depth.

    Args:
        trials: of one optimizer.
        sizes: every width with every depth; depths of None where they were not asked for.
        sampled: whether values came from ranges rather than from a grid.

    Returns:
        The verdict over the widths of the deepest proxies, with that over the depths of the widest in `depth`;
        `transfers`, `sentence`, `advice` and `edges` are of all.
    """
    trials = list(trials)
    widths = sorted({width for width, _ in sizes})
    depths = sorted({depth for _, depth in sizes if depth is not None})
    found = exponents(trials, RATE, per_octave=BINS_PER_OCTAVE if sampled else None)
    if not depths:
        return _answered(judge(trials, widths, sampled=sampled), found)
    noise = seed_noise(trials)

    def line(axis: Axis, held: int) -> Verdict:
        """Along `axis`, the other held at that value."""
        other = "depth" if axis == "width" else "width"
        own = [trial for trial in trials if getattr(trial, other) == held]
        return judge(own, widths if axis == "width" else depths, sampled=sampled, axis=axis, noise=noise)

    wide = {depth: line("width", depth) for depth in reversed(depths)}
    deep = {width: line("depth", width) for width in reversed(widths)}
    main, over_depth = wide[depths[-1]], deep[widths[-1]]
    # A single width, or depth, is what was asked for: the other axis is judged.
    lines = [(f"at depth {depth}", v) for depth, v in wide.items() if len(widths) > 1 or len(depths) == 1]
    lines += [(f"at width {width}", v) for width, v in deep.items() if len(depths) > 1]
    problem = next(((where, verdict) for where, verdict in lines if not verdict.transfers), None)
    if problem is not None:
        where, verdict = problem
        sentence = verdict.sentence.replace("Not confirmed: ", f"Not confirmed {where}: ", 1)
        advice = verdict.advice
    else:
        told = [v for v in (main if len(widths) > 1 else None, over_depth if len(depths) > 1 else None) if v]
        sentence = " ".join(verdict.sentence for verdict in told)
        advice = " ".join(dict.fromkeys(verdict.advice for verdict in told))
    grid: dict[str, dict[str, Optimum]] = {}
    for width, verdict in sorted(deep.items()):
        for name, by_depth in verdict.optima.items():
            grid.setdefault(name, {}).update({f"{width}×{depth}": optimum for depth, optimum in by_depth.items()})
    return _answered(
        replace(
            main,
            transfers=problem is None,
            sentence=sentence,
            advice=advice,
            edges=tuple(dict.fromkeys(edge for _, verdict in lines for edge in verdict.edges)),
            depth=over_depth,
            grid=grid,
        ),
        found,
    )


def _answered(verdict: Verdict, found: Sequence[Exponent]) -> Verdict:
    rate = None if verdict.best is None else verdict.best.params.get(RATE)
    answers = []
    for exponent in found:
        line = verdict.depth if exponent.axis == "depth" else verdict
        optima = {} if line is None else line.optima.get(RATE, {})
        target = WIDER * exponent.last
        there = predicted_rate(optima, target)
        answers.append(exponent.sentence(rate, None if there is None else (target, there[1])))
    return replace(verdict, exponents=tuple(found), answers=tuple(answers))
