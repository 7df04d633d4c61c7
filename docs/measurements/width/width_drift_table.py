"""What `width_drift.py` measured: the exponent of the best rate over the width, and what is lost by transferring it.

    python docs/measurements/width/width_drift_table.py docs/measurements/width/width_drift.jsonl.gz --output FOLDER

Prints the tables of `docs/measurements/width.md`; leaves `width_drift.json` and `width_drift.png`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

NEAR, DRAWS, NOISE = 2.01, 400, 0.006  # steps of √2 on either side of the best; standard deviation of a loss, at least
CLIFF = 0.1  # a loss so far above the least of its curve is no part of a parabola
BASE = 64
SAME_AT_BASE = {"S_mean": "S", "S_root": "S", "S_blocks": "S", "SF_mean": "SF", "SF_blocks": "SF", "P4_mean": "P4"}
NORMS = ("S", "F", "P4", "FN", "FI")
COLOURS = {64: "#440154", 128: "#3b528b", 256: "#21918c", 512: "#5ec962", 1024: "#f08700"}

Curve = dict[int, float]
Curves = dict[tuple[int, int], Curve]  # by width and seed


def used(steps: np.ndarray, losses: np.ndarray, cliff: float) -> np.ndarray:
    """Which points a parabola is put through."""
    best = int(np.argmin(losses))
    near = np.abs(steps - steps[best]) <= NEAR
    low = near & (losses <= losses[best] + cliff)
    return low if low.sum() >= 3 else near


def fit(steps: np.ndarray, losses: np.ndarray, cliff: float) -> tuple[float, float, np.ndarray | None]:
    """Where a parabola through the points has its least, in steps of the grid, and how low that is."""
    best = int(np.argmin(losses))
    points = used(steps, losses, cliff)
    if points.sum() >= 3:
        coefficients = np.polyfit(steps[points] - steps[best], losses[points], 2)
        if coefficients[0] > 1e-5:
            vertex = float(np.clip(-coefficients[1] / (2 * coefficients[0]), -1.5, 1.5))
            return steps[best] + vertex, float(np.polyval(coefficients, vertex)), coefficients
    return float(steps[best]), float(losses[best]), None


def residual_noise(curves: list[Curve], cliff: float) -> float:
    """Pooled standard deviation of losses around their parabolas."""
    total, freedom = 0.0, 0
    for curve in curves:
        steps, losses = arrays(curve)
        if len(steps) < 4:
            continue
        points, best = used(steps, losses, cliff), steps[np.argmin(losses)]
        _, _, coefficients = fit(steps, losses, cliff)
        if points.sum() > 3 and coefficients is not None:
            total += float(((losses[points] - np.polyval(coefficients, steps[points] - best)) ** 2).sum())
            freedom += int(points.sum()) - 3
    return max(NOISE, math.sqrt(total / freedom)) if freedom else 2 * NOISE


def arrays(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    items = sorted((step, loss) for step, loss in curve.items() if math.isfinite(loss))
    return np.array([s for s, _ in items], dtype=float), np.array([x for _, x in items])


def slope(optima: dict[tuple[int, int], float]) -> float:
    """Exponent in the width; optima in steps of √2."""
    x = np.array([math.log2(width) for width, _ in optima])
    y = np.array(list(optima.values())) / 2
    return float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else math.nan


def exponent(curves: Curves, noise: float, cliff: float) -> dict[str, float]:
    """Of the best rate, with a 90 % interval: seeds drawn anew, losses with noise added."""
    rng = np.random.default_rng(0)
    data = {key: arrays(curve) for key, curve in curves.items()}
    draws = []
    for _ in range(DRAWS):
        optima = {}
        for width in sorted({width for width, _ in data}):
            seeds = [seed for w, seed in data if w == width]
            for place, seed in enumerate(rng.choice(seeds, len(seeds))):
                steps, losses = data[width, seed]
                optima[width, place] = fit(steps, losses + rng.normal(0, noise, len(losses)), cliff)[0]
        draws.append(slope(optima))
    low, high = np.quantile(draws, [0.05, 0.95])
    value = slope({key: fit(*pair, cliff)[0] for key, pair in data.items()})
    return {"exponent": value, "low": float(low), "high": float(high)}


def at(curve: Curve, step: float) -> float:
    """The loss at a rate between two that were run; not a number outside of them."""
    return float(np.interp(step, *arrays(curve), left=math.nan, right=math.nan))


def mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None


def analyse(curves: Curves, today: Curves, noises: tuple[float, float]) -> dict[str, Any]:
    """One variant, and today's control at the same widths and seeds."""
    fits = {key: fit(*arrays(curve), CLIFF) for key, curve in curves.items()}
    base = float(np.mean([found[0] for (width, _), found in fits.items() if width == BASE]))
    fits_today = {key: fit(*arrays(curve), CLIFF) for key, curve in today.items()}
    base_today = float(np.mean([found[0] for (width, _), found in fits_today.items() if width == BASE]))
    widths = {}
    for width in sorted({width for width, _ in curves}):
        mine = [key for key in curves if key[0] == width]
        reached = {key: at(curves[key], base) for key in mine}
        reached_today = {key: at(today[key], base_today) for key in mine}
        widths[width] = {
            "seeds": len(mine),
            "rate": 0.1 * 2 ** (float(np.mean([fits[key][0] for key in mine])) / 2),
            "loss": mean([fits[key][1] for key in mine]),
            "lost": mean([reached[key] - fits[key][1] for key in mine]),
            "reached": mean(list(reached.values())),
            "reached_seeds": sum(not math.isnan(value) for value in reached.values()),
            "loss_less_today": mean([fits[key][1] - fits_today[key][1] for key in mine]),
            "reached_less_today": mean([reached[key] - reached_today[key] for key in mine]),
            "reached_less_today_seeds": sum(not math.isnan(reached[key] - reached_today[key]) for key in mine),
        }
    return {
        "all_points": exponent(curves, noises[0], math.inf),
        "without_cliffs": exponent(curves, noises[1], CLIFF),
        "today_there": slope({key: fits_today[key][0] for key in curves}),
        "widths": widths,
    }


def norms_at_best(runs: list[dict[str, Any]], moment: str) -> dict[str, dict[str, float]]:
    """By role and norm: the exponent over the width of the best step's size under that norm, and of the stable rank.

    A norm whose exponent is zero is the one to fix.
    """
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["loss"] is not None and run.get(moment):
            groups[run["width"], run["seed"]].append(run)
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (width, _), group in groups.items():
        vertex, _, _ = fit(*arrays({run["step"]: run["loss"] for run in group}), CLIFF)
        run = min(group, key=lambda run: abs(run["step"] - vertex))
        for role, numbers in run[moment].items():
            points[role, "stable_rank"].append((math.log2(width), math.log2(max(numbers["stable_rank"], 1e-9))))
            for norm in NORMS:
                if f"size_{norm}" in numbers:
                    size = 0.1 * 2 ** (vertex / 2) * max(numbers[f"size_{norm}"], 1e-9)
                    points[role, norm].append((math.log2(width), math.log2(size)))
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (role, norm), pairs in points.items():
        if len({x for x, _ in pairs}) > 1:
            x, y = zip(*pairs, strict=True)
            table[role][norm] = float(np.polyfit(x, y, 1)[0])
    return dict(table)


def read(paths: list[Path]) -> list[dict[str, Any]]:
    runs = {}
    for path in paths:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        for line in text.splitlines():
            run = json.loads(line)
            runs[run["variant"], run["width"], run["seed"], run["step"]] = run
    return list(runs.values())


def with_sign(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def tables(found: dict[str, Any], widths: list[int]) -> None:
    print("| variant | exponent, all points | without cliffs | S there | best rate: best loss (seeds) at ", end="")
    print(" | ".join(map(str, widths)) + " |\n" + "|---" * (4 + len(widths)) + "|")
    for variant, entry in found.items():
        cells = [f"{e['exponent']:+.2f} ({e['low']:+.2f} … {e['high']:+.2f})"
                 for e in (entry["all_points"], entry["without_cliffs"])]  # fmt: skip
        cells.append(with_sign(entry["today_there"], 2))
        for width in widths:
            cell = entry["widths"].get(width)
            cells.append(f"{cell['rate']:.3g}: {cell['loss']:.3f} ({cell['seeds']})" if cell else "")
        print(f"| {variant} | " + " | ".join(cells) + " |")
    wide = [width for width in widths if width >= 512]
    names = ("lost", "reached (seeds)", "best less S's", "reached less S's (seeds)")
    print("\n| variant | " + " | ".join(f"{width}: {name}" for width in wide for name in names) + " |")
    print("|---" * (1 + len(wide) * len(names)) + "|")
    for variant, entry in found.items():
        cells = []
        for width in wide:
            cell = entry["widths"].get(width)
            if cell is None:
                cells += [""] * len(names)
                continue
            reached = "" if cell["reached"] is None else f"{cell['reached']:.3f} ({cell['reached_seeds']})"
            less = with_sign(cell["reached_less_today"])
            cells += [with_sign(cell["lost"]), reached, with_sign(cell["loss_less_today"])]
            cells.append(less and f"{less} ({cell['reached_less_today_seeds']})")
        print(f"| {variant} | " + " | ".join(cells) + " |")


def draw(variants: dict[str, Curves], found: dict[str, Any], path: Path) -> None:
    columns = 4
    rows = math.ceil((len(found) + 1) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for place, (axis, variant) in enumerate(zip(axes.flat, found, strict=False)):
        lows, rates = [], []
        for (width, _), curve in sorted(variants[variant].items()):
            steps, losses = arrays(curve)
            axis.plot(0.1 * 2 ** (steps / 2), losses, ".-", color=COLOURS[width], linewidth=1, markersize=4)
            lows.append(losses.min())
            rates += list(0.1 * 2 ** (steps / 2))
        axis.set_xscale("log")
        axis.set_xlim(min(rates) / 1.15, max(rates) * 1.15)
        axis.set_ylim(min(lows) - 0.02, max(lows) + 0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=7)
        axis.set_title(f"{variant}: {found[variant]['without_cliffs']['exponent']:+.2f}", fontsize=9)
        if place % columns == 0:
            axis.set_ylabel("held-out loss", fontsize=8)
        if place >= len(found) - columns:
            axis.set_xlabel("learning rate", fontsize=8)
    lines = [plt.Line2D([], [], color=colour, marker=".", label=f"width {width}") for width, colour in COLOURS.items()]
    axes.flat[-1].legend(handles=lines, loc="center", fontsize=9, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = read(options.results)
    variants: dict[str, Curves] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        loss = math.inf if run["loss"] is None else run["loss"]
        variants[run["variant"]][run["width"], run["seed"]][run["step"]] = loss
    every = [curve for curves in variants.values() for curve in curves.values()]
    noises = residual_noise(every, math.inf), residual_noise(every, CLIFF)
    today = [residual_noise(list(variants["S"].values()), cliff) for cliff in (math.inf, CLIFF)]
    for variant, same in SAME_AT_BASE.items():
        if variant in variants:
            variants[variant] |= {key: curve for key, curve in variants[same].items() if key[0] == BASE}
    whole = {v: {key: c for key, c in curves.items() if len(arrays(c)[0]) >= 3} for v, curves in variants.items()}
    found = {variant: analyse(curves, whole["S"], noises) for variant, curves in whole.items()}
    print(f"{len(runs)} runs; standard deviation of a loss around its parabola: {noises[0]:.4f} over all points,")
    print(f"{noises[1]:.4f} without those {CLIFF} above the least; of S alone {today[0]:.4f} and {today[1]:.4f}.\n")
    tables(found, sorted({width for entry in found.values() for width in entry["widths"]}))
    print("\nS, by the widths that the exponent is fitted over, all seeds and each:\n")
    optima = {key: fit(*arrays(curve), CLIFF)[0] for key, curve in whole["S"].items()}
    for chosen in ((64, 128, 256), (64, 128, 256, 512), (256, 512, 1024), (64, 512), (64, 1024)):
        mine = {key: step for key, step in optima.items() if key[0] in chosen}
        each = [slope({key: step for key, step in mine.items() if key[1] == seed}) for seed in range(3)]
        print(f"- {chosen}: {slope(mine):+.2f}; " + ", ".join(f"{value:+.2f}" for value in each))
    for variant in ("S", "SF", "P4", "kl_shampoo", "soap", "shampoo", "tekfac"):
        for moment in ("middle", "end"):
            table = norms_at_best([run for run in runs if run["variant"] == variant], moment)
            if not table:
                continue
            found[variant][f"norms_{moment}"] = table
            names = ("stable_rank", *NORMS)
            print(f"\n{variant}, {moment} of the run: exponents of the best step's size under each norm\n")
            print("| role | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
            for role, row in table.items():
                print(f"| {role} | " + " | ".join(with_sign(row.get(name), 2) for name in names) + " |")
    (options.output / "width_drift.json").write_text(json.dumps(found, indent=1))
    draw(variants, found, options.output / "width_drift.png")


if __name__ == "__main__":
    main()
