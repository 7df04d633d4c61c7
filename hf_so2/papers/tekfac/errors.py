"""How far each approximation is from the dense Fisher block of every layer, while a small network trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_so2 import optim
from hf_so2.curvature import TokenBlock
from hf_so2.papers.data import TRAINING, digits
from hf_so2.papers.models import mlp
from hf_so2.papers.tekfac import approximations
from hf_so2.papers.tekfac.approximations import METHODS, Rows
from hf_so2.papers.training import optimizer_step
from hf_so2.papers.verdict import Claim, Comparison, compare

SEEDS = tuple(range(10))
WIDTH, LAYERS, BATCH = 20, 3, 128
LOOKS = (0, 10, 40, 160)
AGE = 40  # steps between a stale basis and the moments measured in it


def measure(seed: int) -> list[dict[str, Any]]:
    """Errors and traces of every approximation at every look, for the block-diagonal Fisher of the whole network."""
    examples = digits(torch.float64)
    model = mlp(WIDTH, LAYERS, seed, torch.float64)
    optimizer = optim.build_optimizer("adamw", model, lr=3e-3)
    records: list[dict[str, Any]] = []
    seen: dict[int, list[Rows]] = {}

    def look(step: int) -> None:
        rows = approximations.rows_of(model, examples.inputs, torch.Generator().manual_seed(1000 * seed + step))
        if step + AGE in LOOKS:
            seen[step] = rows
        if step in LOOKS:
            records.append({"seed": seed, "step": step, **compare_all(rows, seen.get(step - AGE, ()))})

    advance = optimizer_step(optimizer)
    for step, (inputs, labels) in enumerate(examples.batches(LOOKS[-1] + 1, BATCH, seed)):
        if step in LOOKS or step + AGE in LOOKS:
            look(step)
        advance(model, inputs, labels)
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


def claims_of(errors: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Claim, ...]:
    """What is said of the matrices."""
    run = (
        f"MLP 64-{WIDTH}-{WIDTH}-10, Adam, dense Fisher of all {TRAINING} training images"
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
