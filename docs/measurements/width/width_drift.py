"""Which part of K-FAC makes its best learning rate move with the width?

    python docs/measurements/width/prepare_tokens.py out/tokens
    python docs/measurements/width/width_drift.py --data out/tokens --output out/width --device cuda --workers 14 --tf32
    python docs/measurements/width/width_drift_table.py out/width/results.jsonl --output out/width

Trains the Llama of `configs/transfer.yaml` over widths, rates, seeds and variants of the size of an update, of the
damping and of the blocks, many runs side by side on one device. What to run next is decided by what has come back: a
curve over the rate is followed until its least is bracketed, the most informative curves first, so that the program
may be stopped at any time. One JSON line per run in `results.jsonl`; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler, set_seed

from hf_so2.curvature import kfac as kfac_module
from hf_so2.curvature import kl_shampoo as kl_module
from hf_so2.curvature.base import State
from hf_so2.damping import RULES, Damping
from hf_so2.damping import Rule as DampingRule
from hf_so2.engine import norm_control
from hf_so2.errors import TrainingDivergedError
from hf_so2.linalg import newton_root
from hf_so2.linalg.roots import damped_root
from hf_so2.mup import apply_mup, scale_width
from hf_so2.optim import build_optimizer

BASE, SEQUENCE, STEPS, WARMUP, FALLBACK, CLIP = 64, 128, 200, 0.1, 0.04, 1.0
DIRECTIONS, COLD, WARM = 16, 8, 3


# Variants.


@dataclass(frozen=True)
class Variant:
    """What is run.

    Args:
        name: of the curve.
        method: without `_mup`.
        norms: weights of the norms whose geometric mean has to be that of a full-rank update of the target's spectral
            norm, see `NORMS`.
        damping_power: q of `ρ = ε tr(X) / m^q`, m the growth of the width: 0 is today's rule, 1 that relative to the
            mean eigenvalue.
        damping: ε, or the method's default.
        rule: of the damping.
        blocks: K-FAC's factors are block-diagonal, with blocks of the base model's dimensions.
        fallback: factor on the fallback rate.
        tokens: of a step.
        steps: how many.
        tf32: whether products may round their inputs.
    """

    name: str
    method: str = "kfac"
    norms: tuple[tuple[str, float], ...] = (("S", 1.0),)
    damping_power: float = 0.0
    damping: float | None = None
    rule: str = "trace"
    blocks: bool = False
    fallback: float = 1.0
    tokens: int = 1024
    steps: int = STEPS
    tf32: bool | None = None


def _norms(**weights: float) -> tuple[tuple[str, float], ...]:
    return tuple(weights.items())


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("S"),
        Variant("F", norms=_norms(F=1)),
        Variant("SF", norms=_norms(S=0.5, F=0.5)),
        Variant("S75F25", norms=_norms(S=0.75, F=0.25)),
        Variant("P4", norms=_norms(P4=1)),
        Variant("P8", norms=_norms(P8=1)),
        Variant("FN", norms=_norms(FN=1)),
        Variant("FI", norms=_norms(FI=1)),
        Variant("FN75FI25", norms=_norms(FN=0.75, FI=0.25)),
        Variant("S_mean", damping_power=1),
        Variant("S_root", damping_power=0.5),
        Variant("S_eps1e-2", damping=1e-2),
        Variant("S_eps1e-4", damping=1e-4),
        Variant("S_spectral", rule="spectral", damping=4e-3),
        Variant("S_blocks", blocks=True),
        Variant("SF_mean", norms=_norms(S=0.5, F=0.5), damping_power=1),
        Variant("SF_blocks", norms=_norms(S=0.5, F=0.5), blocks=True),
        Variant("P4_mean", norms=_norms(P4=1), damping_power=1),
        Variant("S_fallback_half", fallback=0.5),
        Variant("S_fallback_twice", fallback=2.0),
        Variant("S_8192", tokens=8192),
        Variant("S_800", steps=800),
        Variant("S_exact", tf32=False),
        *(
            Variant(method, method)
            for method in ("kl_shampoo", "soap", "shampoo", "ekfac", "tekfac", "tkfac", "foof", "muon", "adamw")
        ),
        *(
            Variant(f"{method}_SF", method, norms=_norms(S=0.5, F=0.5))
            for method in ("kl_shampoo", "soap", "shampoo", "tekfac")
        ),
    )
}


# Patches of the package, driven by the run under way.


@dataclass
class Current:
    variant: Variant
    growth: float
    bases: dict[tuple[int, ...], dict[str, Tensor]] = field(default_factory=dict)
    keep: bool = False
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)


CURRENT: list[Current] = []


def spectral_norms(stack: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest singular values of a stack of matrices, as `hf_so2.linalg.spectral_norm`, with Cholesky for QR."""
    iterations = WARM if basis is not None else COLD
    if basis is None:
        rows = stack.square().sum(dim=2).topk(min(DIRECTIONS, *stack.shape[1:]), dim=1).indices
        product = torch.gather(stack, 1, rows.unsqueeze(2).expand(-1, -1, stack.shape[2])).mT
        basis = _orthonormal(product)
    for _ in range(iterations):
        basis = _orthonormal(stack.mT @ (stack @ basis))
    image = (stack @ basis).double()
    gram = (image.mT @ image).nan_to_num()
    return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt().to(stack.dtype), basis


def _orthonormal(columns: Tensor) -> Tensor:
    wide = columns.double()
    wide = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-300)
    gram = wide.mT @ wide
    gram.diagonal(dim1=1, dim2=2).add_(1e-12)
    factor, _ = torch.linalg.cholesky_ex(gram.nan_to_num())
    return torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False).to(columns.dtype)


def _gram(stack: Tensor) -> Tensor:
    return stack @ stack.mT if stack.shape[1] <= stack.shape[2] else stack.mT @ stack


def _schatten4(stack: Tensor) -> Tensor:
    unit = stack.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    return _gram(stack / unit).square().sum(dim=(1, 2)) ** 0.25 * unit.flatten()


def _schatten8(stack: Tensor) -> Tensor:
    unit = stack.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    gram = _gram(stack / unit)
    return (gram @ gram).square().sum(dim=(1, 2)) ** 0.125 * unit.flatten()


def control(updates: Any, settings: Any) -> None:
    """Every update gets the norm that the variant says, all layers of one shape at once."""
    run = CURRENT[0]
    weights = dict(run.variant.norms)
    by_shape = defaultdict(list)
    for u in updates:
        by_shape[tuple(u.update.shape)].append(u)
    for shape, group in by_shape.items():
        fan_out, fan_in = shape
        rank, target = min(shape), math.sqrt(fan_out / fan_in)
        if group[0].layer.block.orthogonal and weights == {"S": 1.0}:
            for u in group:
                u.update.mul_(target)
            continue
        stack = torch.stack([u.update for u in group])
        sizes: dict[str, Tensor] = {}
        if "S" in weights or run.keep:
            sizes["S"], run.bases[shape] = spectral_norms(stack, run.bases.get(shape))
        if "F" in weights or run.keep:
            sizes["F"] = torch.linalg.vector_norm(stack, dim=(1, 2)) / math.sqrt(rank)
        if "P4" in weights or run.keep:
            sizes["P4"] = _schatten4(stack) / rank**0.25
        if "P8" in weights:
            sizes["P8"] = _schatten8(stack) / rank**0.125
        has_factors = run.variant.method in ("kfac", "ekfac")
        if "FN" in weights or "FI" in weights or (run.keep and has_factors):
            states = [u.layer.state for u in group]
            a = torch.stack([state["A"] / state["weight"] for state in states])
            b = torch.stack([state["B"] / state["weight"] for state in states])
            through = stack @ a
            trace = a.diagonal(dim1=1, dim2=2).sum(dim=1)
            sizes["FN"] = target * ((through * stack).sum(dim=(1, 2)) / fan_out / (trace / fan_in)).clamp(min=0).sqrt()
            sizes["FI"] = target * ((b @ stack) * through).sum(dim=(1, 2)).clamp(min=0).sqrt()
        value = torch.ones_like(next(iter(sizes.values())))
        for name, weight in weights.items():
            value = value * sizes[name] ** weight
        scale = torch.where(value > 0, target / value, torch.zeros_like(value))
        for u, factor in zip(group, scale.unbind(), strict=True):
            u.update.mul_(factor)
        if run.keep:
            for index, u in enumerate(group):
                # In units of what the controlled update has: the size under one norm of a step under another.
                run.kept[u.layer.name] = {
                    "stable_rank": rank * (sizes["F"][index] / sizes["S"][index]) ** 2,
                    "rank": torch.tensor(float(rank)),
                    **{f"size_{name}": size[index] / value[index] for name, size in sizes.items()},
                }


def _scaled_trace(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    run = CURRENT[0]
    rho_a, rho_b = ORIGINAL_TRACE.factored(damping, a, b)
    factor = run.growth**-run.variant.damping_power
    return rho_a * factor, rho_b * factor


def _power_largest(matrix: Tensor) -> Tensor:
    """λ_max of a positive semi-definite matrix from below."""
    columns = matrix[:, matrix.diagonal().topk(min(DIRECTIONS, len(matrix))).indices].unsqueeze(0)
    for _ in range(6):
        columns = _orthonormal(matrix @ columns)
    return torch.linalg.eigvalsh((columns.mT @ (matrix @ columns)).double())[0, -1].to(matrix.dtype)


def _spectral_damping(damping: Damping, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rho_a, rho_b = (damping.epsilon * (x.max() if x.ndim == 1 else _power_largest(x)) for x in (a, b))
    return rho_a, rho_b


def _blocked_refresh(self: Any, state: State, damping: Damping) -> None:
    """Each block of a factor is damped by its own trace."""
    run = CURRENT[0]
    count = round(run.growth)
    if not run.variant.blocks or count == 1:
        ORIGINAL_REFRESH(self, state, damping)
        return
    for side in self.exponents:
        factor = self.moments.factor(state, side)
        size = len(factor) // count
        parts = factor.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        rho = damping.epsilon * parts.diagonal(dim1=1, dim2=2).sum(dim=1)
        damped = parts + rho.reshape(-1, 1, 1) * torch.eye(size, device=factor.device, dtype=factor.dtype)
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        state[f"{side}_root"].copy_(torch.block_diag(*inverses.unbind()))


def _half_root(matrix: Tensor, damping: Tensor, exponent: float) -> Tensor:
    if matrix.device.type == "cpu" or exponent != 0.5 or len(matrix) < 256:
        return damped_root(matrix, damping, exponent)
    return newton_root(matrix, damping, 2)  # a GPU multiplies much faster than it decomposes


ORIGINAL_TRACE, ORIGINAL_REFRESH = RULES["trace"], kfac_module.KFAC.refresh


def patch() -> None:
    own = norm_control.NORM_CONTROLS["spectral"]
    norm_control.NORM_CONTROLS["spectral"] = replace(own, apply=control, of_the_whole_model=True)
    RULES["trace"] = _with_factored(RULES["trace"], _scaled_trace)
    RULES["spectral"] = _with_factored(RULES["spectral"], _spectral_damping)
    kfac_module.KFAC.refresh = _blocked_refresh
    kl_module.damped_root = _half_root


def _with_factored(rule: DampingRule, factored: Any) -> DampingRule:
    return replace(rule, factored=factored)


# One run.


@dataclass(frozen=True)
class Run:
    variant: str
    width: int
    step: int  # of the grid of rates
    seed: int

    @property
    def rate(self) -> float:
        return 0.1 * 2 ** (self.step / 2)


def train(run: Run, data: dict[str, Any], device: str, *, tf32: bool, steps: int | None = None) -> dict[str, Any]:
    """Trains and judges once; the loss is None where training diverged."""
    started = time.perf_counter()
    variant = VARIANTS[run.variant]
    steps = steps or variant.steps
    rounded = tf32 if variant.tf32 is None else variant.tf32
    base = LlamaConfig(**data["config"])
    CURRENT[:] = [Current(variant, run.width / BASE)]
    set_seed(max(run.seed, 0))
    model = AutoModelForCausalLM.from_config(scale_width(base, width=run.width))
    apply_mup(model, base)
    model.to(device).train()
    settings: dict[str, Any] = {"lr": run.rate}
    if variant.method != "adamw":
        settings["norm_control"] = "spectral"
    else:
        settings["adam_beta2"] = 0.999
    settings["fallback_learning_rate"] = FALLBACK * variant.fallback
    if variant.damping is not None:
        settings["damping"] = variant.damping
    if variant.rule != "trace":
        settings["damping_rule"] = variant.rule
    if variant.method == "shampoo" and device != "cpu" and run.width >= 256:
        settings["shampoo_root"] = "newton"
    optimizer = build_optimizer(variant.method + "_mup", model, base_config=base, **settings)
    scheduler = get_scheduler("cosine", optimizer, math.ceil(steps * WARMUP), steps)
    batch = variant.tokens // SEQUENCE
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(max(run.seed, 0)))
    order = order[: steps * batch].reshape(steps, batch)
    rows = torch.from_numpy(data["train"].astype(np.int64)[order.numpy()]).to(device)
    loss, diverged, losses = None, False, []
    for index in range(steps):
        CURRENT[0].keep = index == steps - 1 or index == steps // 2
        ids = rows[index]
        # What is preconditioned must not be rounded: directions of large eigenvalues are a thousandth of the inverse.
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.set_float32_matmul_precision("highest")
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if index == steps // 2:
            CURRENT[0].kept, middle = {}, CURRENT[0].kept
        if (index + 1) % 20 == 0:
            losses.append(float(loss.detach()))
            if not losses[-1] < 12:
                diverged = True
                break
    result: dict[str, Any] = {**asdict(run), "rate": run.rate, "method": variant.method, "loss": None}
    if not diverged:
        result["loss"] = _evaluate(model, data["eval"], device)
        diverged = not math.isfinite(result["loss"])
        if diverged:
            result["loss"] = None
        result["middle"], result["end"] = _by_role(middle), _by_role(CURRENT[0].kept)
    result |= {"diverged": diverged, "losses": losses, "seconds": time.perf_counter() - started, "tf32": rounded}
    result |= {"device": device, "skipped": optimizer.skipped_steps}
    return result


@torch.no_grad()
def _evaluate(model: Any, blocks: np.ndarray, device: str) -> float:
    model.eval()
    total = 0.0
    for part in np.array_split(blocks.astype(np.int64), max(1, len(blocks) // 64)):
        ids = torch.from_numpy(part).to(device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(part)
    return total / len(blocks)


def _by_role(kept: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Means over the layers of a role, geometric ones."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, numbers in kept.items():
        role = name.split(".")[-2]
        for key, value in numbers.items():
            values[role][key].append(math.log(max(float(value), 1e-30)))
    return {
        role: {key: round(math.exp(sum(logs) / len(logs)), 5) for key, logs in numbers.items()}
        for role, numbers in values.items()
    }


# Which run next.

# At the base width the same as another.
SAME_AT_BASE = {
    "S_mean": "S", "S_root": "S", "S_blocks": "S", "SF_mean": "SF", "SF_blocks": "SF", "P4_mean": "P4"
}  # fmt: skip

# The step of the grid of the best rate at width 64, and by how many steps it moves with each doubling of the width.
CENTRES: dict[str, tuple[float, float]] = {
    "S": (0, 0.75), "S_exact": (0, 0.75), "S_mean": (0, 0.5), "S_root": (0, 0.6), "S_eps1e-2": (0, 0.5),
    "S_eps1e-4": (0, 0.75), "S_spectral": (0, 0.6), "S_blocks": (0, 0.4), "S_fallback_half": (0, 0.75),
    "S_fallback_twice": (0, 0.75), "S_8192": (1, 0.75), "S_800": (-1, 0.75), "F": (-3, -0.5), "SF": (-2, 0),
    "SF_mean": (-2, 0), "SF_blocks": (-2, 0), "P4_mean": (-2, 0), "S75F25": (-1, 0.4), "P4": (-2, 0.1), "P8": (-1, 0.4),
    "FN": (-4, 0.5), "FI": (-9, -1.2), "FN75FI25": (-6, 0), "kl_shampoo": (-1, 0.5), "soap": (-1, 0.5),
    "shampoo": (-1, 0.4), "ekfac": (-1, 0.4), "tekfac": (-1, 0.5), "tkfac": (0, 0.5), "foof": (0, 0.1),
    "muon": (-4, 0.3), "adamw": (-7, 0.2), "kl_shampoo_SF": (-3, 0), "soap_SF": (-3, 0), "shampoo_SF": (-3, 0),
    "tekfac_SF": (-3, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    variant: str
    width: int
    seed: int
    least: int = 5  # points

    def wanted(self, done: dict[int, float], running: set[int], hint: int | None) -> list[int]:
        """The steps of the grid to be run now, most useful first; none while what is under way decides."""
        if len(done) + len(running) >= 10:
            return []
        start, slope = CENTRES[self.variant]
        centre = hint if hint is not None else round(start + slope * math.log2(self.width / BASE))
        first = [centre, centre + 2, centre - 2]
        missing = [step for step in first if step not in done and step not in running]
        if missing:
            return missing
        if any(step in running for step in first):
            return []
        best = min(done, key=lambda step: done[step])
        if math.isinf(done[best]):
            wanted = [min(done) - 3]
        else:
            # Once the neighbours are known the best may be another.
            near = [best - 1, best + 1]
            far = [best - 2, best + 2] if self.least >= 5 else []
            outer = [step for step in (best - 2, best + 2) if not min(done) <= step <= max(done)]
            wanted = [*outer, *near, *far]
        return [step for step in dict.fromkeys(wanted) if step not in done and step not in running]


def plan() -> list[Curve]:
    """The curves, most informative first."""
    curves: list[Curve] = []

    def add(names: str, widths: str, seeds: str = "0") -> None:
        for seed in map(int, seeds.split()):
            for name in names.split():
                curves.extend(Curve(name, int(width), seed) for width in widths.split())

    # What separates the causes, at the ends of the range.
    add("S", "1024 64 256")
    add("SF P4 S_blocks S_mean", "1024 64 256")
    add("S75F25 F", "1024 64")
    add("S_fallback_half S_fallback_twice S_eps1e-2", "512 64")
    add("FN75FI25 FN", "512 64")
    # The other methods, at widths that they are quick at.
    add("muon kl_shampoo adamw", "512 64")
    add("S SF P4", "512 128 1024 64 256", "1")
    add("soap shampoo tekfac", "512 64")
    add("P4_mean SF_mean SF_blocks", "512 64")
    add("S SF P4", "512 128")
    add("S SF P4", "1024 64 256 512 128", "2")
    add("S_8192 S_spectral P8 S_root", "512 64")
    add("kl_shampoo_SF soap_SF shampoo_SF tekfac_SF", "512 64")
    add("muon adamw kl_shampoo", "1024 256 128")
    add("S_exact", "512")
    add("FI S_800 S_eps1e-4 tkfac foof ekfac", "512 64")
    add("S_blocks S_mean S75F25", "64 512", "1 2")
    add("muon kl_shampoo adamw soap shampoo tekfac", "64 512", "1 2")
    return list(dict.fromkeys(curve for curve in curves if curve.width != BASE or curve.variant not in SAME_AT_BASE))


class Plan:
    """Hands out runs and takes results."""

    def __init__(self, curves: list[Curve], results: list[dict[str, Any]]) -> None:
        self.curves = curves
        self.done: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
        self.running: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        self.durations: dict[tuple[str, int], list[float]] = defaultdict(list)
        for result in results:
            self.take(result)

    def take(self, result: dict[str, Any]) -> None:
        key = result["variant"], result["width"], result["seed"]
        loss = result["loss"]
        self.done[key][result["step"]] = math.inf if loss is None else loss
        self.running[key].discard(result["step"])
        if loss is not None:
            self.durations[result["variant"], result["width"]].append(result["seconds"])

    def expected(self, variant: str, width: int) -> float:
        known = self.durations.get((variant, width))
        if known:
            return max(known[-5:])
        method = VARIANTS[variant].method
        alike = [max(d) for (name, w), d in self.durations.items() if w == width and VARIANTS[name].method == method]
        return max(alike) if alike else 0.0

    def next(self, left: float) -> Run | None:
        """The next run that should end within `left` seconds."""
        for curve in self.curves:
            key = curve.variant, curve.width, curve.seed
            if self.expected(curve.variant, curve.width) > left:
                continue
            hint = None
            first = self.done.get((curve.variant, curve.width, 0))
            if curve.seed and first:
                hint = min(first, key=lambda step: first[step])
            wanted = curve.wanted(self.done[key], self.running[key], hint)
            if wanted:
                self.running[key].add(wanted[0])
                return Run(curve.variant, curve.width, wanted[0], curve.seed)
        return None


# Workers.


def load(folder: Path) -> dict[str, Any]:
    return {
        "train": np.load(folder / "train.npy"),
        "eval": np.load(folder / "eval.npy"),
        "config": json.loads((folder / "config.json").read_text()),
    }


def work(number: int, inbox: Any, outbox: Any, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = load(options.data)
    patch()
    while True:
        run = inbox.get()
        if run is None:
            return
        try:
            steps = 1 if run.seed < 0 else options.steps
            outbox.put((number, run, train(run, data, options.device, tf32=options.tf32, steps=steps)))
        except TrainingDivergedError:
            numbers = {"rate": run.rate, "method": VARIANTS[run.variant].method, "loss": None, "diverged": True}
            outbox.put((number, run, {**asdict(run), **numbers, "seconds": 0.0}))
        except Exception:  # noqa: BLE001 - a run that fails ends no other
            outbox.put((number, run, traceback.format_exc()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--steps", type=int, help="fewer, to try the program")
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--first", nargs="*", default=[], help="curves before the plan's: SF:64,1024:1,2 and so on")
    parser.add_argument("--tf32", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    torch.set_num_threads(1)
    print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)
    # A device that the parent has asked for is lost to a fork.
    context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    outbox = context.Queue()
    inboxes = [context.Queue() for _ in range(options.workers)]
    processes = [
        context.Process(target=work, args=(i, inbox, outbox, options), daemon=True) for i, inbox in enumerate(inboxes)
    ]
    for process, inbox in zip(processes, inboxes, strict=True):
        process.start()
        inbox.put(Run("S", 64, 0, -1))  # warms up
    curves = [Curve(name, int(width), int(seed))
              for part in options.first
              for name, widths, seeds in [part.split(":")]
              for seed in seeds.split(",") for width in widths.split(",")]  # fmt: skip
    todo = Plan(list(dict.fromkeys([*curves, *plan()])), results)
    busy, idle, count, started = set(range(options.workers)), set(), 0, time.monotonic()
    with path.open("a", encoding="utf-8") as file:
        while time.monotonic() < deadline:
            for number in sorted(idle):
                run = todo.next(deadline - time.monotonic()) if count < options.runs else None
                if run is None:
                    break
                count += 1
                idle.discard(number)
                busy.add(number)
                inboxes[number].put(run)
            if not busy:
                break
            try:
                number, run, result = outbox.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                dead = [i for i in busy if not processes[i].is_alive()]
                for i in dead:
                    print(f"worker {i} has died with {processes[i].exitcode}", flush=True)
                    busy.discard(i)
                continue
            busy.discard(number)
            idle.add(number)
            if isinstance(result, str):
                print(f"FAILED {run}\n{result}", flush=True)
                if run.seed >= 0:  # as if it had diverged, or the curve would wait for it
                    todo.take({**asdict(run), "loss": None})
                continue
            if run.seed < 0:
                print(f"worker {number} is warm after {time.monotonic() - started:.1f} s", flush=True)
                continue
            file.write(json.dumps(result) + "\n")
            file.flush()
            todo.take(result)
            loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
            print(
                f"{time.monotonic() - started:6.1f} {run.variant} {run.width} {run.rate:.4f} seed {run.seed}:"
                f" {loss}, {result['seconds']:.1f} s",
                flush=True,
            )
    for process in processes:
        process.kill()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
