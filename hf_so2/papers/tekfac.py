"""TEKFAC (arXiv 2011.13609) with TKFAC (2011.10741) and EKFAC (1806.03884): nearer to the Fisher, and faster?

Two parts. The first trains a small network and measures at several times how far each approximation is from the dense
Fisher block of every layer. The second trains a larger one with each method, all tuned with the same number of trials,
and compares losses after the same number of steps and after the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from hf_so2 import optim
from hf_so2.curvature import TokenBlock
from hf_so2.papers import approximations
from hf_so2.papers.approximations import METHODS, Rows
from hf_so2.papers.digits import Digits, mlp
from hf_so2.papers.report import Findings
from hf_so2.papers.training import TRIALS, Ranges, Run, optimizer_step, single_threaded, train, tune
from hf_so2.papers.verdict import Claim, Comparison, compare, differences

SEEDS = (0, 1, 2, 3, 4)

SMALL_WIDTH, SMALL_LAYERS = 20, 3
LOOKS = (0, 10, 40, 160)
AGE = 40  # steps between a stale basis and the moments measured in it

WIDTH, LAYERS, BATCH, STEPS = 64, 4, 128, 80
LONG = 6  # times as many steps of a first-order method take about as long as TEKFAC's
RATES = {"learning_rate": (1e-3, 1.0)}
DAMPED: Ranges = {**RATES, "damping": (1e-5, 1.0)}
# Two hyperparameters each: the rate, and what smooths the method.
CONTESTANTS: Mapping[str, tuple[str, Ranges]] = {
    "SGD with momentum": ("sgd", {"learning_rate": (1e-2, 10.0), "momentum_left": (0.03, 0.5)}),
    "Adam": ("adamw", {"learning_rate": (1e-4, 0.1), "adam_epsilon": (1e-10, 1e-2)}),
    "K-FAC": ("kfac", DAMPED),
    "EKFAC": ("ekfac", DAMPED),
    "TKFAC": ("tkfac", DAMPED),
    "TEKFAC": ("tekfac", DAMPED),
}
FIRST_ORDER = ("SGD with momentum", "Adam")
LONGER = {f"{name}, {LONG} x the steps": name for name in FIRST_ORDER}


@single_threaded
def tekfac() -> Findings:
    """All claims of the three papers."""
    errors = [measure(seed) for seed in SEEDS]
    best, runs = race()
    tables = {
        "errors": errors,
        "relations": relations(errors),
        "tuned": best,
        "race": {name: [vars(run) for run in of_method] for name, of_method in runs.items()},
    }
    claims = (*claims_of_errors(errors), *claims_of_race(runs))
    return Findings(claims, tables, lambda path: draw(errors, runs, path))


# The first part: errors.


def measure(seed: int) -> list[dict[str, Any]]:
    """Errors and traces of every approximation at every look, for the block-diagonal Fisher of the whole network."""
    digits = Digits.load(torch.float64)
    model = mlp(SMALL_WIDTH, SMALL_LAYERS, seed, torch.float64)
    optimizer = optim.build_optimizer("adamw", model, lr=3e-3)
    records: list[dict[str, Any]] = []
    seen: dict[int, list[Rows]] = {}

    def look(step: int) -> None:
        rows = approximations.rows_of(model, digits.images, torch.Generator().manual_seed(1000 * seed + step))
        if step + AGE in LOOKS:
            seen[step] = rows
        if step in LOOKS:
            records.append({"seed": seed, "step": step, **compare_all(rows, seen.get(step - AGE, ()))})

    advance = optimizer_step(optimizer)
    for step, (images, labels) in enumerate(digits.batches(LOOKS[-1] + 1, BATCH, seed)):
        if step in LOOKS or step + AGE in LOOKS:
            look(step)
        advance(model, images, labels)
    return records


def compare_all(layers: Sequence[Rows], stale: Sequence[Rows]) -> dict[str, Any]:
    """Errors relative to the norm of the block-diagonal matrix, traces relative to its trace.

    Where there are older rows besides: what stands between two decompositions, K-FAC as it was then, and EKFAC in the
    basis of then with moments of now.
    """
    fishers = [rows.fisher for rows in layers]
    norm = math.sqrt(sum(float(fisher.square().sum()) for fisher in fishers))
    trace = sum(float(fisher.trace()) for fisher in fishers)
    result: dict[str, Any] = {"error": {}, "trace": {}, "trace_worst_layer": {}, "error_of_layers": {}}
    approximated: dict[str, list[torch.Tensor]] = {}
    fits: dict[str, tuple[TokenBlock, Sequence[Rows]]] = {name: (block, ()) for name, block in METHODS.items()}
    if stale:
        fits |= {f"stale {name}": (block, stale) for name, block in METHODS.items()}
    for name, (block, older) in fits.items():
        states = [
            approximations.fitted(block, old, rows if older and "S" in block.statistics else None)
            for rows, old in zip(layers, older or layers, strict=True)
        ]
        dense = [approximations.dense(name.removeprefix("stale "), state) for state in states]
        squares = [float((matrix - fisher).square().sum()) for matrix, fisher in zip(dense, fishers, strict=True)]
        ratios = [approximations.trace_ratio(matrix, fisher) for matrix, fisher in zip(dense, fishers, strict=True)]
        result["error"][name] = math.sqrt(sum(squares)) / norm
        result["trace"][name] = sum(float(matrix.trace()) for matrix in dense) / trace
        result["trace_worst_layer"][name] = max(ratios, key=lambda ratio: abs(ratio - 1))
        result["error_of_layers"][name] = [
            approximations.error(matrix, fisher) for matrix, fisher in zip(dense, fishers, strict=True)
        ]
        approximated[name] = dense
    # EKFAC is the projection of the block on what is diagonal in the basis, in which K-FAC is diagonal too.
    for near, far in (("EKFAC", "K-FAC"), ("TEKFAC", "TKFAC")):
        between = sum(float((a - b).square().sum()) for a, b in zip(approximated[near], approximated[far], strict=True))
        sides = result["error"][near] ** 2 + between / norm**2
        result[f"right angle at {near}"] = sides / result["error"][far] ** 2 - 1
    return result


def relations(errors: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """How the approximations stand to each other: geometric means over seeds and looks of ratios of errors."""
    rows = []
    names = list(METHODS)
    for first in names:
        for second in names:
            if first != second:
                samples = log_ratios(errors, first, second)
                comparison = compare("log10 ratio", samples, below=0.0)
                rows.append(
                    {
                        "pair": f"{first} / {second}",
                        "error_ratio": 10**comparison.mean,
                        "interval": [10**end for end in comparison.interval],
                        "looks_at_which_less": share(errors, first, second),
                    }
                )
    return rows


def log_ratios(errors: Sequence[Sequence[Mapping[str, Any]]], first: str, second: str) -> list[float]:
    """Per seed, the mean over the looks that have both of log10 of the ratio of their errors."""
    result = []
    for records in errors:
        both = [record["error"] for record in records if {first, second} <= record["error"].keys()]
        result.append(sum(math.log10(e[first] / e[second]) for e in both) / len(both))
    return result


def share(errors: Sequence[Sequence[Mapping[str, Any]]], first: str, second: str) -> float:
    """Of all seeds and looks, at how many the first error is the less."""
    wins = [record["error"][first] <= record["error"][second] * (1 + 1e-9) for records in errors for record in records]
    return sum(wins) / len(wins)


def farthest_trace(errors: Sequence[Sequence[Mapping[str, Any]]], name: str) -> list[float]:
    """Per seed, the farthest that a layer's trace is from that of its exact block, relative, over the looks."""
    return [max(abs(record["trace_worst_layer"][name] - 1) for record in records) for records in errors]


def claims_of_errors(errors: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Claim, ...]:
    """What is said of the matrices."""
    run = (
        f"MLP 64-{SMALL_WIDTH}-{SMALL_WIDTH}-10, Adam, dense Fisher of all {len(Digits.load().labels)} training images"
        f" at steps {', '.join(map(str, LOOKS))}; {len(SEEDS)} seeds"
    )

    def nearer(first: str, second: str) -> Comparison:
        samples = log_ratios(errors, first, second)
        return compare(f"log10 of {first}'s error over {second}'s", samples, below=0.0)

    return (
        Claim("ekfac-optimal", "1806.03884", "proposition 1", "EKFAC's error is at most K-FAC's, the basis being the"
              " same", run, (nearer("EKFAC", "K-FAC"),), can_fail=False),
        Claim("ekfac-stale", "1806.03884", "", f"between decompositions, {AGE} steps after the last, EKFAC's error is"
              " below K-FAC's, since its moments are of today", run, (nearer("stale EKFAC", "stale K-FAC"),)),
        Claim("tkfac-trace", "2011.10741", "equation 11", "TKFAC keeps the trace of every exact block, which K-FAC does"
              " not", run, (
                  compare("farthest trace of TKFAC from 1", farthest_trace(errors, "TKFAC"), below=1e-6),
                  compare("farthest trace of K-FAC from 1", farthest_trace(errors, "K-FAC"), above=0.01),
              )),
        Claim("tkfac-error", "2011.10741", "", "TKFAC is nearer to the Fisher than K-FAC", run,
              (nearer("TKFAC", "K-FAC"),)),
        Claim("tekfac-rescaling", "2011.13609", "", "TEKFAC corrects TKFAC's rescaling: its error is at most TKFAC's",
              run, (nearer("TEKFAC", "TKFAC"),), can_fail=False),
        Claim("tekfac-error", "2011.13609", "", "TEKFAC is nearer to the Fisher than EKFAC", run,
              (nearer("TEKFAC", "EKFAC"),)),
    )  # fmt: skip


# The second part: losses.


def contest(name: str, values: Mapping[str, float], digits: Digits, seed: int) -> Run:
    """One run of a contestant."""
    optimizer_name, _ = CONTESTANTS[LONGER.get(name, name)]
    steps = STEPS * LONG if name in LONGER else STEPS
    model = mlp(WIDTH, LAYERS, seed)
    settings: dict[str, Any] = dict(values)
    if "momentum_left" in settings:  # a logarithmic range of what momentum lacks to 1
        settings["momentum"] = 1 - settings.pop("momentum_left")
    if "damping" in settings:
        settings |= {"norm_control": "none", "fisher": "mc"}
    step = optimizer_step(optim.build_optimizer(optimizer_name, model, **settings))
    return train(model, step, digits, steps=steps, batch=BATCH, seed=seed, looks=range(0, steps, 10))


def race() -> tuple[dict[str, dict[str, float]], dict[str, list[Run]]]:
    """The best hyperparameters of each method, and fresh runs with them."""
    digits = Digits.load()
    best: dict[str, dict[str, float]] = {}
    runs: dict[str, list[Run]] = {}
    for name in (*CONTESTANTS, *LONGER):
        ranges = CONTESTANTS[LONGER.get(name, name)][1]

        def score(values: Mapping[str, float], seed: int, name: str = name) -> float:
            return contest(name, values, digits, seed).score

        best[name] = tune(score, ranges)
    for seed in SEEDS:  # in turn, so that a busy machine slows all methods alike
        for name in best:
            runs.setdefault(name, []).append(contest(name, best[name], digits, seed))
    return best, runs


def claims_of_race(runs: Mapping[str, Sequence[Run]]) -> tuple[Claim, ...]:
    """What is said of training."""
    run = (
        f"MLP 64-{WIDTH}-{WIDTH}-{WIDTH}-10, batch {BATCH}, {STEPS} steps, each method tuned by {TRIALS} trials of two"
        f" hyperparameters, Fisher of drawn labels; {len(SEEDS)} fresh seeds"
    )

    def ahead(first: str, second: str) -> Comparison:
        samples = differences([r.score for r in runs[first]], [r.score for r in runs[second]])
        return compare(f"log10 of {first}'s training loss over {second}'s", samples, below=0.0)

    def ahead_in_time(name: str) -> Comparison:
        longer = next(key for key, value in LONGER.items() if value == name)
        pairs = zip(runs["TEKFAC"], runs[longer], strict=True)
        samples = [a.score - b.score_after(a.seconds[-1]) for a, b in pairs]
        return compare(f"log10 of TEKFAC's loss over {name}'s when TEKFAC is done", samples, below=0.0)

    return (
        Claim("ekfac-per-step", "1806.03884", "", "EKFAC has a lower loss than K-FAC after the same number of steps",
              run, (ahead("EKFAC", "K-FAC"),)),
        Claim("tkfac-per-step", "2011.10741", "", "TKFAC has a lower loss than K-FAC after the same number of steps",
              run, (ahead("TKFAC", "K-FAC"),)),
        Claim("tekfac-first-order", "2011.13609", "abstract", "TEKFAC has a lower loss than SGD with momentum and Adam"
              " after the same number of steps", run, (ahead("TEKFAC", "SGD with momentum"), ahead("TEKFAC", "Adam"))),
        Claim("tekfac-siblings", "2011.13609", "abstract", "TEKFAC has a lower loss than EKFAC and TKFAC after the same"
              " number of steps", run, (ahead("TEKFAC", "EKFAC"), ahead("TEKFAC", "TKFAC"))),
        Claim("tekfac-in-time", "2011.13609", "", "TEKFAC has a lower loss than SGD with momentum and Adam after the"
              " same time", f"{run}; first-order methods tuned once more, for {LONG} times the steps",
              tuple(ahead_in_time(name) for name in FIRST_ORDER)),
    )  # fmt: skip


def draw(errors: Sequence[Sequence[Mapping[str, Any]]], runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Errors over the steps, and losses over steps and seconds."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [*METHODS, "stale K-FAC", "stale EKFAC"]
    for index, name in enumerate(names):
        points = [(r["step"], r["error"][name]) for records in errors for r in records if name in r["error"]]
        steps = sorted({step for step, _ in points})
        means = [sum(e for s, e in points if s == step) / sum(s == step for s, _ in points) for step in steps]
        left.plot(steps, means, "o:" if "stale" in name else "o-", color=f"C{index}", label=name)
        left.plot(*zip(*points, strict=True), ".", color=f"C{index}", alpha=0.3)
    left.set_xscale("symlog", linthresh=10)
    left.set(xlabel="step", ylabel="‖F̃ - F‖ / ‖F‖", title="Distance from the block-diagonal Fisher", ylim=(0, None))
    for index, (name, of_method) in enumerate(runs.items()):
        shown = [run for run in of_method if all(math.isfinite(loss) for loss in run.losses)]
        for number, run in enumerate(shown):
            label = name if number == 0 else None
            if name not in LONGER:
                middle.plot(run.steps, run.losses, color=f"C{index}", alpha=0.6, linewidth=1, label=label)
            right.plot(run.seconds, run.losses, color=f"C{index}", alpha=0.6, linewidth=1, label=label)
    for axes, title in ((middle, "step"), (right, "seconds of training")):
        axes.set(xlabel=title, ylabel="training loss (nats)", title=f"Tuned alike, {len(SEEDS)} seeds each")
        axes.set_yscale("log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        for line in axes.legend(fontsize=8).get_lines():
            line.set_alpha(1)
    figure.savefig(path, dpi=100)
