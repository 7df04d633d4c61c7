"""What `width_drift.py` measured: the exponent of the best rate over the width, and what is lost by transferring it.

    python experiments/width_drift_table.py results.jsonl [more.jsonl ...] --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

NEAR, DRAWS, NOISE = 2.01, 400, 0.006  # steps of √2 on either side of the best; standard deviation of a loss, at least
BASE = 64
SAME_AT_BASE = {"S_mean": "S", "S_root": "S", "S_blocks": "S", "SF_mean": "SF", "SF_blocks": "SF", "P4_mean": "P4"}
NORMS = ("S", "F", "P4", "FN", "FI")


def fit(steps: np.ndarray, losses: np.ndarray) -> tuple[float, float, np.ndarray | None]:
    """Where a parabola through the points has its least, in steps of the grid, and how low that is."""
    best = int(np.argmin(losses))
    near = np.abs(steps - steps[best]) <= NEAR
    if near.sum() >= 3:
        coefficients = np.polyfit(steps[near] - steps[best], losses[near], 2)
        if coefficients[0] > 1e-5:
            vertex = float(np.clip(-coefficients[1] / (2 * coefficients[0]), -1.5, 1.5))
            return steps[best] + vertex, float(np.polyval(coefficients, vertex)), coefficients
    return float(steps[best]), float(losses[best]), None


def residual_noise(curves: dict[Any, dict[int, float]]) -> float:
    """Pooled standard deviation of losses around their parabolas."""
    total, freedom = 0.0, 0
    for curve in curves.values():
        steps, losses = arrays(curve)
        if len(steps) < 4:
            continue
        best = steps[np.argmin(losses)]
        near = np.abs(steps - best) <= NEAR
        if near.sum() > 3:
            _, _, coefficients = fit(steps, losses)
            if coefficients is not None:
                total += float(((losses[near] - np.polyval(coefficients, steps[near] - best)) ** 2).sum())
                freedom += int(near.sum()) - 3
    return max(NOISE, math.sqrt(total / freedom)) if freedom else 2 * NOISE


def arrays(curve: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    items = sorted((step, loss) for step, loss in curve.items() if math.isfinite(loss))
    return np.array([s for s, _ in items], dtype=float), np.array([x for _, x in items])


def is_edge(curve: dict[int, float]) -> bool:
    steps, losses = arrays(curve)
    best = steps[np.argmin(losses)]
    return best in (min(curve), max(curve)) or len(steps) < 3


def slope(optima: dict[tuple[int, int], float]) -> float:
    """Exponent in the width; optima in steps of √2."""
    x = np.array([math.log2(width) for width, _ in optima])
    y = np.array(list(optima.values())) / 2
    return float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else math.nan


def analyse(curves: dict[tuple[int, int], dict[int, float]], noise: float) -> dict[str, Any]:
    """One variant: curves by width and seed."""
    rng = np.random.default_rng(0)
    data = {key: arrays(curve) for key, curve in curves.items()}
    data = {key: pair for key, pair in data.items() if len(pair[0]) >= 2}
    fits = {key: fit(*pair) for key, pair in data.items()}
    exponent = slope({key: found[0] for key, found in fits.items()})
    draws = []
    widths = sorted({width for width, _ in data})
    for _ in range(DRAWS):
        optima = {}
        for width in widths:
            seeds = [seed for w, seed in data if w == width]
            for place, seed in enumerate(rng.choice(seeds, len(seeds))):
                steps, losses = data[width, seed]
                optima[width, place] = fit(steps, losses + rng.normal(0, noise, len(losses)))[0]
        draws.append(slope(optima))
    low, high = np.quantile(draws, [0.05, 0.95]) if not math.isnan(exponent) else (math.nan, math.nan)
    by_width = {}
    for width in widths:
        mine = [fits[key] for key in data if key[0] == width]
        by_width[width] = {
            "rate": 0.1 * 2 ** (float(np.mean([found[0] for found in mine])) / 2),
            "loss": float(np.mean([found[1] for found in mine])),
            "seeds": len(mine),
            "edge": any(is_edge(curves[key]) for key in data if key[0] == width),
            "points": sum(len(data[key][0]) for key in data if key[0] == width),
        }
    base = 2 * math.log2(by_width[widths[0]]["rate"] / 0.1)
    for width in widths:
        lost = []
        for key in data:
            if key[0] == width:
                steps, losses = data[key]
                vertex, least, coefficients = fits[key]
                best = steps[np.argmin(losses)]
                if coefficients is not None and abs(base - best) <= NEAR:
                    lost.append(float(np.polyval(coefficients, base - best)) - least)
                else:
                    lost.append(float(np.interp(base, steps, losses)) - least)
        by_width[width]["lost"] = float(np.mean(lost))
    return {"exponent": exponent, "low": float(low), "high": float(high), "widths": by_width}


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
        steps = np.array([run["step"] for run in group], dtype=float)
        vertex, _, _ = fit(steps, np.array([run["loss"] for run in group]))
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in options.results:
        for line in path.read_text().splitlines():
            run = json.loads(line)
            runs[run["variant"], run["width"], run["seed"], run["step"]] = run
    variants: dict[str, dict[tuple[int, int], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (variant, width, seed, step), run in runs.items():
        variants[variant][width, seed][step] = math.inf if run["loss"] is None else run["loss"]
    for variant, same in SAME_AT_BASE.items():
        if variant in variants:
            variants[variant] |= {key: curve for key, curve in variants[same].items() if key[0] == BASE}
    noise = residual_noise({(v, *key): curve for v, curves in variants.items() for key, curve in curves.items()})
    found = {}
    for variant, curves in variants.items():
        finite = {key: curve for key, curve in curves.items() if len(arrays(curve)[0]) >= 2}
        if finite:
            found[variant] = analyse(finite, noise)
    widths = sorted({width for entry in found.values() for width in entry["widths"]})
    print(f"{len(runs)} runs; standard deviation of a loss around its parabola {noise:.4f}; * on an edge\n")
    print("Best rate and its loss (number of seeds), and what the best rate of the narrowest loses there.\n")
    print("| variant | exponent (90 %) | " + " | ".join(map(str, widths)) + " |")
    print("|---" * (len(widths) + 2) + "|")
    for variant, entry in found.items():
        cells = []
        for width in widths:
            cell = entry["widths"].get(width)
            if cell is None:
                cells.append("")
                continue
            star = "*" if cell["edge"] else ""
            cells.append(f"{cell['rate']:.4g}{star}: {cell['loss']:.3f} ({cell['seeds']}), {cell['lost']:+.3f}")
        interval = f"{entry['exponent']:+.2f} ({entry['low']:+.2f} … {entry['high']:+.2f})"
        print(f"| {variant} | {interval} | " + " | ".join(cells) + " |")
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs.values():
        by_variant[run["variant"]].append(run)
    for variant in ("S", "SF", "P4", "kl_shampoo", "soap", "shampoo", "tekfac"):
        for moment in ("middle", "end"):
            table = norms_at_best(by_variant.get(variant, []), moment)
            if not table:
                continue
            found[variant][f"norms_{moment}"] = table
            names = ("stable_rank", *NORMS)
            print(f"\n{variant}, {moment} of the run: exponents over the width of the best step's size under each norm\n")
            print("| role | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
            for role, row in table.items():
                cells = [f"{row[name]:+.2f}" if name in row else "" for name in names]
                print(f"| {role} | " + " | ".join(cells) + " |")
    (options.output / "width_drift.json").write_text(json.dumps(found, indent=1))
    columns = 4
    rows = math.ceil(len(variants) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    colours = dict(zip(widths, plt.get_cmap("viridis")(np.linspace(0, 0.9, max(1, len(widths)))), strict=False))
    for axis, (variant, curves) in zip(axes.flat, variants.items(), strict=False):
        lows = []
        for (width, seed), curve in sorted(curves.items()):
            steps, losses = arrays(curve)
            if len(steps):
                label = str(width) if seed == 0 else None
                axis.plot(0.1 * 2 ** (steps / 2), losses, ".-", color=colours.get(width), label=label, linewidth=1)
                lows.append(losses.min())
        axis.set_xscale("log")
        if lows:
            axis.set_ylim(min(lows) - 0.02, max(lows) + 0.25)
        entry = found.get(variant)
        axis.set_title(variant + (f" {entry['exponent']:+.2f}" if entry else ""), fontsize=9)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(options.output / "width_drift.png", dpi=110)


if __name__ == "__main__":
    main()
