"""Are the defaults within 0.05 nats of the best rates in settings which they were not tuned on?

    python docs/measurements/settings/ten_settings.py --output out/settings --minutes 40
    python docs/measurements/settings/ten_settings.py --output out/settings --table

K-FAC at its defaults, then with each of its two rates multiplied by a few factors while the other stays (a cross), then
with the best of both and its neighbours. One JSON line per run in `results.jsonl`; what is there is not run again.
Beside it, the highest loss of ten steps of a plain loop without warm-up or clip, and of AdamW at 0.001 in the same
loop. Stops when its own processor time is spent. `--variant NAME --set key=value` runs the same with other defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from settings_runs import ALL, SETTINGS, Run, first_steps, train

RATES = (0.5, 2.0, 0.25, 4.0)
FALLBACKS = (0.25, 4.0, 1 / 16)
# LoRA has no fallback; two more look for what GPT-2's rate depends on; long runs go without the larger fallback rate.
FEWER: dict[str, tuple[float, ...]] = dict.fromkeys(
    ("12 layers", "800 steps", "8,192 tokens a step", "vocabulary 16,384"), (0.25, 1 / 16)
)
FEWER |= dict.fromkeys(("LoRA", "GPT-2, not tied", "Llama, tied"), ())

Losses = dict[tuple[float, float], float]


def cross(losses: Losses, fallbacks: tuple[float, ...]) -> Iterator[tuple[float, float]]:
    """Factors of the next runs of a setting, from the losses of those before it."""
    if (1.0, 1.0) not in losses:
        yield 1.0, 1.0
    for factors in [(rate, 1.0) for rate in RATES] + [(1.0, fallback) for fallback in fallbacks]:
        if _may_help(factors, losses):
            yield factors
    rate = min((r for r, f in losses if f == 1), key=lambda r: losses[r, 1.0])
    fallback = min((f for r, f in losses if r == 1), key=lambda f: losses[1.0, f])
    if (rate, fallback) not in losses:
        yield rate, fallback
    rate, fallback = min(losses, key=losses.__getitem__)
    for factors in [(rate, fallback / 4), (rate, fallback * 4), (rate / 2, fallback), (rate * 2, fallback)]:
        inside = min(RATES) <= factors[0] <= max(RATES) and (factors[1] == 1 or factors[1] in fallbacks)
        # One neighbour more, where the best corner is better than the cross by what matters.
        if inside and factors not in losses and losses[rate, fallback] < losses[1.0, 1.0] - 0.04:
            yield factors


def _may_help(factors: tuple[float, float], losses: Losses) -> bool:
    """Whether factors are new, and not behind a worse one on the way from 1."""
    if factors in losses:
        return False
    rate, fallback = factors
    nearer = [
        (r, f)
        for r, f in losses
        if (f == fallback == 1 and (rate < r < 1 or 1 < r < rate)) or (r == rate == 1 and fallback < f < 1)
    ]
    return all(losses[point] < losses[1.0, 1.0] for point in nearer)


def next_factors(setting: str, losses: Losses) -> tuple[float, float] | None:
    return next(cross(losses, FEWER.get(setting, FALLBACKS)), None) if losses else (1.0, 1.0)


def losses_of(results: list[dict[str, Any]], setting: str, variant: str, seed: int) -> Losses:
    mine = [r for r in results if (r["setting"], r["variant"], r["seed"]) == (setting, variant, seed) and "loss" in r]
    return {(r["rate"], r["fallback"]): math.inf if r["loss"] is None else r["loss"] for r in mine}


def table(results: list[dict[str, Any]], seed: int = 0) -> str:
    """Losses at the defaults by variant, the least of all variants (its name beside it), and the first steps."""
    variants = list(dict.fromkeys(r["variant"] for r in results))
    by_variant = "".join(f" {variant} |" for variant in variants)
    lines = [
        f"| setting |{by_variant} tuned | at rate, fallback | gap | no warm-up: start |{by_variant} AdamW |",
        "|---" * (2 * len(variants) + 6) + "|",
    ]
    for setting in ALL:
        losses = {variant: losses_of(results, setting, variant, seed) for variant in variants}
        own = [losses[variant].get((1.0, 1.0), math.nan) for variant in variants]
        tried = [(loss, point, variant) for variant in variants for point, loss in losses[variant].items()]
        if not tried:
            continue
        least, (rate, fallback), variant = min(tried)
        at = f"× {rate:g}, × {fallback:g}, {variant}"
        gap = own[-1] - least
        steps = {r["variant"]: r for r in results if r["setting"] == setting and "own" in r}
        told = [_shown(steps[v]["own"]) if v in steps else "-" for v in variants]
        any_steps = next(iter(steps.values()), {"start": math.nan, "adamw": math.nan})
        cells = [setting, *(f"{loss:.3f}" for loss in own), f"{least:.3f}", at, f"{gap:.3f}"]
        cells += [_shown(any_steps["start"]), *told, _shown(any_steps["adamw"])]
        lines.append("| " + " | ".join(cells).replace("nan", "-") + " |")
    return "\n".join(lines)


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.2f}"


def parsed(assignments: list[str]) -> dict[str, Any]:
    pairs = (assignment.split("=", 1) for assignment in assignments)
    return {name: json.loads(value) for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(ALL))
    parser.add_argument("--factors", nargs="+", help="rate,fallback pairs instead of the cross; 1,1 are the defaults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="defaults")
    parser.add_argument("--set", nargs="+", default=[], help="settings of the optimizer, key=JSON")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = arguments.output / "results.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        print(table(results, arguments.seed))
        return
    torch.set_num_threads(1)
    changes = parsed(arguments.set)

    def keep(entry: dict[str, Any]) -> None:
        entry["seconds"] = round(time.process_time() - began, 1)
        results.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()})
        with path.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)

    for setting in arguments.only:
        began = time.process_time()
        if began > 60 * arguments.minutes:
            break
        about = {"setting": setting, "variant": arguments.variant, "seed": arguments.seed}
        if not any(all(r.get(k) == v for k, v in about.items()) and "own" in r for r in results):
            keep({**about, **first_steps(setting, changes, arguments.output)})
        while time.process_time() < 60 * arguments.minutes:
            losses = losses_of(results, setting, arguments.variant, arguments.seed)
            factors = next_factors(setting, losses)
            if arguments.factors:
                wanted = [tuple(map(float, pair.split(","))) for pair in arguments.factors]
                factors = next((pair for pair in wanted if pair not in losses), None)
            if factors is None:
                break
            began = time.process_time()
            run = Run(setting, *factors, seed=arguments.seed, variant=arguments.variant)
            keep({**about, "rate": factors[0], "fallback": factors[1], **train(run, changes, arguments.output)})
    print(table(results, arguments.seed))


if __name__ == "__main__":
    main()
