"""Does the best learning rate stay where it is when a small Llama becomes deeper, with the depth's rule and without?

    python docs/measurements/depth/depth_transfer.py --output out/depth --minutes 15
    python docs/measurements/depth/depth_transfer.py --output out/depth --table

Trains byte-level Llamas of one width on Python's standard library, over depths and a grid of rates by factors of 2.
Each curve starts at the method's rate and is followed on both sides until its least is bracketed. One JSON line per run
in `results.jsonl`; what is there is not run again. Stops when its own processor time is spent.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from hf_so2 import build_optimizer, scale_depth
from hf_so2.data.corpora import standard_library_sources

BASE_DEPTH, WIDTH, SEQUENCE, BATCH, STEPS, WARMUP, FALLBACK = 2, 64, 64, 4, 100, 10, 0.01
STARTS = {"kfac": 0.06, "muon": 0.03, "adamw": 0.005}
DEPTHS = (2, 16, 4, 8)


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BASE_DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        initializer_range=WIDTH**-0.5,
    )


def batches(count: int, seed: int, data: Tensor) -> Tensor:
    """`(count, BATCH, SEQUENCE)` bytes, drawn at random places."""
    starts = torch.randint(len(data) - SEQUENCE, (count * BATCH,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + SEQUENCE] for start in starts]).view(count, BATCH, SEQUENCE).long()


def run(method: str, rule: bool, depth: int, rate: float, seed: int, data: tuple[Tensor, Tensor]) -> float:
    """The loss on held-out bytes after training; infinite where it diverged."""
    base = config()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(scale_depth(base, depth))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(WIDTH**0.5)
    arguments = {"base_config": base} if rule else {}
    name = f"{method}_mup" if rule else method
    optimizer = build_optimizer(name, model, lr=rate, fallback_learning_rate=FALLBACK, **arguments)
    schedule = get_scheduler("linear", optimizer, WARMUP, STEPS)
    for batch in batches(STEPS, seed, data[0]):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        if not float(loss.detach()) < 20:
            return math.inf
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = [float(model(input_ids=b, labels=b).loss) for b in batches(32, 10_000, data[1])]
    return sum(losses) / len(losses)


def next_rate(curve: dict[float, float], start: float) -> float | None:
    """The next rate of a curve that is to be bracketed; None when its least is inside."""
    if not curve:
        return start
    best = min(curve, key=curve.__getitem__)
    return next((rate for rate in (best / 2, best * 2) if not any(math.isclose(rate, r) for r in curve)), None)


def table(results: list[dict]) -> str:
    lines = ["| method | rule | depth | best rate | loss there | losses by rate |", "|---|---|---|---|---|---|"]
    # At the base depth the rule changes nothing.
    results = [r for r in results if r["depth"] != BASE_DEPTH] + [
        {**r, "rule": rule} for r in results if r["depth"] == BASE_DEPTH for rule in (True, False)
    ]
    keys = sorted({(r["method"], r["rule"], r["depth"]) for r in results}, key=str)
    exponents: dict[tuple[str, bool], dict[int, float]] = {}
    for method, rule, depth in sorted(keys, key=lambda k: (k[0], -k[1], k[2])):
        curve = {r["rate"]: r["loss"] for r in results if (r["method"], r["rule"], r["depth"]) == (method, rule, depth)}
        best, bracketed = _vertex(curve)
        exponents.setdefault((method, rule), {})[depth] = best
        told = ", ".join(f"{rate:.4g}: {loss:.3f}" for rate, loss in sorted(curve.items()))
        edge = "" if bracketed else " (edge)"
        how, least = "with" if rule else "without", min(curve.values())
        lines.append(f"| {method} | {how} | {depth} | {best:.4g}{edge} | {least:.3f} | {told} |")
    lines += ["", "| method | rule | exponent of the best rate over the depth |", "|---|---|---|"]
    for (method, rule), best in exponents.items():
        if len(best) > 1:
            x = torch.tensor([math.log(d) for d in best], dtype=torch.float64)
            y = torch.tensor([math.log(r) for r in best.values()], dtype=torch.float64)
            slope = float(((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum())
            lines.append(f"| {method} | {'with' if rule else 'without'} | {slope:+.2f} ({min(best)} to {max(best)}) |")
    return "\n".join(lines)


def _vertex(curve: dict[float, float]) -> tuple[float, bool]:
    """The least of the parabola through the best rate and its neighbours, on logarithms; the best rate at an edge."""
    rates = sorted(curve)
    index = rates.index(min(curve, key=curve.__getitem__))
    if index in (0, len(rates) - 1):
        return rates[index], False
    low, mid, high = (curve[rates[i]] for i in (index - 1, index, index + 1))
    if not math.isfinite(low + high):
        return rates[index], True
    return rates[index] * 2 ** (0.5 * (low - high) / (low - 2 * mid + high)), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    path = arguments.output / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        print(table(results))
        return
    torch.set_num_threads(1)
    text = "".join(source for source, _ in zip(standard_library_sources(), range(200), strict=False)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = int(0.9 * len(data))
    parts = data[:split], data[split:]
    for depth in DEPTHS:
        for method, start in STARTS.items():
            for rule in (True, False):
                while True:
                    mine = [r for r in results if (r["method"], r["rule"], r["depth"]) == (method, rule, depth)]
                    # At the base depth the rule changes nothing.
                    if depth == BASE_DEPTH and not rule:
                        mine = [{**r, "rule": False} for r in results if (r["method"], r["depth"]) == (method, depth)]
                    rate = next_rate({r["rate"]: r["loss"] for r in mine}, start)
                    if rate is None or time.process_time() > 60 * arguments.minutes:
                        break
                    began = time.process_time()
                    losses = [run(method, rule, depth, rate, seed, parts) for seed in arguments.seeds]
                    result = {"method": method, "rule": rule, "depth": depth, "rate": rate}
                    result |= {"loss": sum(losses) / len(losses), "seconds": round(time.process_time() - began, 1)}
                    results.append(result)
                    with path.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                    print(json.dumps(result), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
