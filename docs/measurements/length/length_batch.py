"""Where is the best learning rate when a small Llama trains longer, or on larger batches?

    python docs/measurements/length/length_batch.py --output out/length --minutes 29
    python docs/measurements/length/length_batch.py --output out/length --table

A byte-level Llama of width 64 and 2 layers on Python's standard library, for several (steps, batch). Each curve is
followed by factors of 2 until its least is bracketed; then come the rates a factor √2 to both sides of it, and all five
with every further seed. One JSON line per run in `results.jsonl`; what is there is not run again. Stops when its own
processor time is spent.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from hf_so2 import build_optimizer
from hf_so2.data.corpora import standard_library_sources

WIDTH, SEQUENCE, BATCH, FALLBACK = 64, 64, 4, 0.04
STARTS = {"kfac_mup": 0.12, "adamw_mup": 0.008}
# (steps, batch in units of BATCH sequences). Length; batch at equal steps; batch at equal tokens (400, 1).
CELLS = ((200, 1), (100, 1), (400, 1), (200, 4), (100, 4), (200, 2), (800, 1))
LAWS: Mapping[str, tuple[tuple[tuple[int, int], ...], Callable[[tuple[int, int]], int]]] = {
    "steps, batch kept": (((100, 1), (200, 1), (400, 1), (800, 1)), lambda cell: cell[0]),
    "batch, 200 steps": (((200, 1), (200, 2), (200, 4)), lambda cell: cell[1]),
    "batch, equal tokens": (((400, 1), (200, 2), (100, 4)), lambda cell: cell[1]),
}
DRAWS = 4000

Cell = tuple[int, int]
Curve = dict[float, dict[int, float]]
"""Losses by rate and seed."""


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
    )


def sequences(count: int, seed: int, data: Tensor) -> Tensor:
    """`(count, SEQUENCE)` bytes, drawn at random places."""
    starts = torch.randint(len(data) - SEQUENCE, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + SEQUENCE] for start in starts]).long()


def run(method: str, cell: Cell, rate: float, seed: int, data: tuple[Tensor, Tensor], fallback: float) -> float:
    """The loss on held-out bytes after training; infinite where it diverged."""
    steps, times = cell
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config())
    optimizer = build_optimizer(method, model, lr=rate, fallback_learning_rate=fallback, base_config=config())
    schedule = get_scheduler("cosine", optimizer, steps // 10, steps)
    for batch in sequences(steps * times * BATCH, seed, data[0]).view(steps, times * BATCH, SEQUENCE):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        if not float(loss.detach()) < 20:
            return math.inf
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held_out = sequences(512, 10_000, data[1]).view(8, 64, SEQUENCE)
    with torch.no_grad():
        return sum(float(model(input_ids=b, labels=b).loss) for b in held_out) / len(held_out)


def curve_of(results: list[dict[str, Any]], method: str, cell: Cell) -> Curve:
    """What was run of one method and cell."""
    curve: Curve = {}
    for r in results:
        if r["method"] == method and (r["steps"], r["batch"]) == cell:
            curve.setdefault(r["rate"], {})[r["seed"]] = r["loss"] if r["loss"] is not None else math.inf
    return dict(sorted(curve.items()))


def find(values: Mapping[float, Any], rate: float) -> float | None:
    """The key of `values` that is `rate` to round-off."""
    return next((value for value in values if math.isclose(value, rate, rel_tol=1e-3)), None)


def next_run(curve: Curve, start: float, seeds: int) -> tuple[float, int] | None:
    """The rate and seed that a cell lacks; None when it is complete."""
    first = {rate: by_seed[0] for rate, by_seed in curve.items() if 0 in by_seed}
    if not first:
        return start, 0
    best = min(first, key=first.__getitem__)
    around = [best * 2**power for power in (-1, 1, -0.5, 0.5)]
    missing = next((rate for rate in around if find(first, rate) is None), None)
    if missing is not None:
        return float(f"{missing:.4g}"), 0
    rates = [best, *around]
    while True:
        for seed in range(1, seeds):
            for rate in rates:
                known = find(curve, rate)
                if known is None or seed not in curve[known]:
                    return known or float(f"{rate:.4g}"), seed
        # The least of the means may be another than the first seed's.
        means = {rate: sum(by.values()) / seeds for rate, by in complete(curve, seeds).items()}
        least = min(means, key=means.__getitem__)
        rates = [least * 2**power for power in (-1, 1, -0.5, 0.5)]
        if all(find(means, rate) is not None for rate in rates):
            return None
        missing = next((rate for rate in rates if find(first, rate) is None), None)
        if missing is not None:
            return float(f"{missing:.4g}"), 0


def near(points: Mapping[float, float]) -> dict[float, float]:
    """Those within a factor of 2 of the best."""
    best = min(points, key=points.__getitem__)
    return {r: loss for r, loss in points.items() if abs(math.log2(r / best)) < 1.01 and math.isfinite(loss)}


def vertex(points: Mapping[float, float]) -> float:
    """log2 of the rate at the least of the parabola through the points near the best; the best where none fits."""
    best = min(points, key=points.__getitem__)
    around = near(points)
    x = np.log2(np.array(list(around))) - math.log2(best)
    a, b, _ = np.polyfit(x, list(around.values()), 2)
    return math.log2(best) + (float(np.clip(-b / (2 * a), -1, 1)) if a > 0 else 0.0)


def complete(curve: Curve, seeds: int) -> Curve:
    """The rates that have all seeds."""
    return {rate: by for rate, by in curve.items() if len(by) >= seeds}


def drawn_vertices(curve: Curve, rng: np.random.Generator, noise: float) -> np.ndarray:
    """`(DRAWS,)` log2 of best rates of the mean over seeds, with noise of this standard deviation in every run."""
    means = near({rate: sum(by.values()) / len(by) for rate, by in curve.items()})
    rates, losses = np.array(list(means)), np.array(list(means.values()))
    # Drawn around the fitted parabola, not around the losses: those have their noise already.
    x = np.log2(rates)
    fit = np.polyfit(x - x.mean(), losses, 2)
    around = np.polyval(fit, x - x.mean())
    number = np.sqrt([len(curve[rate]) for rate in means])
    draws = rng.normal(around[:, None], noise / number[:, None], (len(rates), DRAWS))
    fits = np.polyfit(x - x.mean(), draws, 2)
    places = np.where(fits[0] > 0, -fits[1] / (2 * np.where(fits[0] > 0, fits[0], 1)), np.sign(-fits[1]) * 9)
    return np.clip(places, x.min() - x.mean(), x.max() - x.mean()) + x.mean()


def noise_of(curves: list[Curve]) -> float:
    """Standard deviation of one run's loss around its curve's parabola, a seed's common shift taken out, pooled."""
    squares, freedom = 0.0, 0
    for curve in curves:
        rates = near({rate: sum(by.values()) / len(by) for rate, by in curve.items()})
        x = np.log2(np.array(list(rates)))
        table = np.array([[curve[rate][seed] for seed in sorted(curve[rate])] for rate in rates])  # (rates, seeds)
        table = table - table.mean(0)
        residual = table - np.polyval(np.polyfit(x - x.mean(), table.mean(1), 2), x - x.mean())[:, None]
        squares, freedom = squares + float((residual**2).sum()), freedom + table.size - table.shape[1] - 2
    return math.sqrt(squares / freedom)


def table(results: list[dict[str, Any]], seeds: int) -> str:
    lines = ["| method | steps | batch | best rate | by seed | loss there | losses by rate, mean over seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    laws = ["", "| method | over | exponent of the best rate | 95 % interval | by seed |", "|---|---|---|---|---|"]
    rng = np.random.default_rng(0)
    for method in STARTS:
        whole = {cell: complete(curve_of(results, method, cell), seeds) for cell in sorted(CELLS)}
        whole = {cell: curve for cell, curve in whole.items() if len(curve) >= 5}
        if not whole:
            continue
        noise = noise_of(list(whole.values()))
        for cell, curve in whole.items():
            means = {rate: sum(by.values()) / seeds for rate, by in curve.items()}
            own = ", ".join(
                f"{2 ** vertex({rate: by[seed] for rate, by in curve.items()}):.3g}" for seed in range(seeds)
            )
            told = ", ".join(f"{rate:.3g}: {loss:.3f}" for rate, loss in means.items())
            best = 2 ** vertex(means)
            lines.append(
                f"| {method} | {cell[0]} | × {cell[1]} | {best:.3g} | {own} | {min(means.values()):.3f} | {told} |"
            )
        for name, (cells, size) in LAWS.items():
            if any(cell not in whole for cell in cells):
                continue
            x = np.log2([size(cell) for cell in cells])
            weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
            middle = weights @ [
                vertex({rate: sum(by.values()) / seeds for rate, by in whole[cell].items()}) for cell in cells
            ]
            draws = weights @ np.stack([drawn_vertices(whole[cell], rng, noise) for cell in cells])
            own = [
                weights @ [vertex({rate: by[s] for rate, by in whole[cell].items()}) for cell in cells]
                for s in range(seeds)
            ]
            low, high = np.quantile(draws, [0.025, 0.975])
            told = ", ".join(f"{value:+.2f}" for value in own)
            laws.append(f"| {method} | {name} | **{middle:+.2f}** | {low:+.2f} … {high:+.2f} | {told} |")
        laws.append(f"| {method} | noise of a run | {noise:.4f} | | |")
    return "\n".join(lines + laws)


def wanted(results: list[dict[str, Any]], seeds: int) -> Iterator[tuple[str, Cell, float, int]]:
    """Runs in the order in which to do them; `results` grows meanwhile."""
    for cell in CELLS:
        for method, start in STARTS.items():
            while (missing := next_run(curve_of(results, method, cell), start, seeds)) is not None:
                yield method, cell, *missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=29)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fallback", type=float, default=FALLBACK)
    arguments = parser.parse_args()
    path = arguments.output / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not arguments.table:
        torch.set_num_threads(1)
        text = "".join(source for source, _ in zip(standard_library_sources(), range(200), strict=False)).encode()
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        split = int(0.9 * len(data))
        for method, cell, rate, seed in wanted(results, arguments.seeds):
            if time.process_time() > 60 * arguments.minutes:
                break
            began = time.process_time()
            loss = run(method, cell, rate, seed, (data[:split], data[split:]), arguments.fallback)
            result = {"method": method, "steps": cell[0], "batch": cell[1], "rate": rate, "seed": seed}
            result |= {"loss": loss if math.isfinite(loss) else None, "seconds": round(time.process_time() - began, 1)}
            results.append(result)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    print(table(results, arguments.seeds))


if __name__ == "__main__":
    main()
