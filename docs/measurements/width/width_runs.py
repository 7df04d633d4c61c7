"""The variants of K-FAC that `width_drift.py` compares, how the package is made to run them, and one run."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler, set_seed

from hf_so2.curvature import kfac as kfac_module
from hf_so2.curvature import kl_shampoo as kl_module
from hf_so2.curvature.base import State
from hf_so2.damping import RULES, Damping
from hf_so2.damping import Rule as DampingRule
from hf_so2.engine import norm_control
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
