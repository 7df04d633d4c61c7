"""What the curvature of a model looks like while it trains, as numbers for a log.

Nothing here changes a step. Off observed steps nothing is computed; on them a few norms stay on the device until
`report` is asked for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor, nn

from hf_so2.curvature import EKFAC, KFAC, SOAP, Blocked, CurvatureBlock, KLShampoo, Shampoo, State, Tied
from hf_so2.curvature import sides as two_sided
from hf_so2.curvature.shampoo import normalisation
from hf_so2.damping import Damping
from hf_so2.linalg import DecompositionError, block_diagonal, spectral_norm, trace
from hf_so2.linalg.eigen import RESOLUTION
from hf_so2.optim.layer import Layer
from hf_so2.optim.preconditioned import LayerUpdate, over_parts
from hf_so2.optim.statistics import Curvature

# The cost of these products grows with the square of a factor, of an eigendecomposition with the cube; 1 % off at most.
ITERATIONS, DIRECTIONS = 8, 16

LEVELS = ("role", "layer")

# The first pattern found in a parameter's name; whatever matches none is of the role "other". BERT and its kin name the
# two halves of an MLP as parts of the layer itself.
ROLES = {
    "attention": re.compile(r"attn|[aA]ttention"),
    "mlp": re.compile(
        r"mlp|ffn|feed_forward|DenseReluDense|experts?\b|\bff\b|\bfc|\blayer\.\d+\.(intermediate|output)\."
    ),
}


@dataclass
class StepRecord:
    """What only the step itself can tell.

    Attributes:
        enabled: whether the coming step is recorded.
        step: number of the recorded step.
        update_rms: by layer, the root mean square of the entries of its change, weight decay aside, 0-dim.
        norm_factor: by what a norm control of the whole model multiplied the length of all updates, 0-dim.
    """

    enabled: bool = False
    step: int = 0
    update_rms: dict[str, Tensor] = field(default_factory=dict)
    norm_factor: Tensor | None = None
    _length: Tensor | None = None

    def before_norm_control(self, updates: Sequence[LayerUpdate]) -> None:
        """Take the length of all updates before a norm control of the whole model."""
        if self.enabled and updates:
            self._length = _total_length(updates)

    def after_norm_control(self, updates: Sequence[LayerUpdate], step: int) -> None:
        """Take what is about to be applied; recording ends with it."""
        if not self.enabled:
            return
        self.enabled, self.step = False, step
        self.update_rms = {
            u.layer.name: u.group["lr"] * norm / math.sqrt(math.prod(u.layer.shape))
            for u, norm in zip(updates, _lengths(updates), strict=True)
        }
        self.norm_factor = _total_length(updates) / self._length if self._length is not None else None
        self._length = None


def _lengths(updates: Sequence[LayerUpdate]) -> Tensor:
    """The Frobenius norm of every update; a collective where there are parts of them."""
    if not updates:
        return torch.zeros(0)
    device = updates[0].update.device
    lengths = torch.stack([torch.linalg.vector_norm(u.update).to(device, torch.float64) for u in updates])
    return over_parts(updates, lengths.square()).sqrt()


def _total_length(updates: Sequence[LayerUpdate]) -> Tensor:
    return torch.linalg.vector_norm(_lengths(updates))


@singledispatch
def spectra(block: CurvatureBlock, state: State, damping: Damping) -> dict[str, Tensor]:
    """Trace, damping ρ and condition number of a block's damped factors, each 0-dim; nothing for a block without any.

    Trace and ρ are those of the averages as they stand. The condition number is `(λ_max + ρ) / (λ_min + ρ)`.
    """
    return {}


@spectra.register
def _(block: KFAC, state: State, damping: Damping) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for side, damped in block.damped_factors(state, damping).items():
        found |= _of_roots({side: damped}, {side: state[f"{side}_root"]}, block.exponents[side])
    return found


@spectra.register
def _(block: EKFAC, state: State, damping: Damping) -> dict[str, Tensor]:
    damped = block.damped(state)
    return {"trace": state["S"].sum(), "damping": state["rho"].mean(), "condition": damped.max() / damped.min()}


@spectra.register
def _(block: Tied, state: State, damping: Damping) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for side, (factor, rho) in block.damped_factors(state, damping).items():
        found |= {f"trace_{side}": _trace(factor), f"damping_{side}": rho}
    blocks = [mean for mean, _ in block.mean_blocks(state, damping).values()]
    if blocks:
        # The basis whitens the average token's block: its own norm is that of the inverse's root.
        inverse_norm = _norm(state["common_basis"]).square()
        found["condition"] = (_norm(torch.stack(blocks).sum(dim=0)) * inverse_norm).clamp(min=1)
    return found


@spectra.register
def _(block: Shampoo, state: State, damping: Damping) -> dict[str, Tensor]:
    roots = two_sided.suffixed(state, "_root")
    factors = two_sided.damped_factors(state, block.sides, damping)
    if block.normalized and block.sides == two_sided.BOTH:
        roots["L"] = roots["L"] / normalisation(factors["L"][0])
    return _of_roots(factors, roots, block.power)


@spectra.register
def _(block: KLShampoo, state: State, damping: Damping) -> dict[str, Tensor]:
    return _of_roots(
        two_sided.damped_factors(state, block.sides, damping), two_sided.suffixed(state, "_root"), exponent=0.5
    )


@spectra.register
def _(block: SOAP, state: State, damping: Damping) -> dict[str, Tensor]:
    """Nothing is damped; eigenvalues are those of the kept basis, none below what a decomposition resolves."""
    found: dict[str, Tensor] = {}
    for side, factor in two_sided.suffixed(state, "").items():
        values = state[f"{side}_values"]
        largest = values.max().clamp(min=torch.finfo(values.dtype).tiny)
        least = values.min().clamp(min=0) / largest
        found |= {
            f"trace_{side}": factor.trace() / state["weight"],
            f"condition_{side}": 1 / least.clamp(min=RESOLUTION * torch.finfo(values.dtype).eps),
        }
    return found


@spectra.register
def _(block: Blocked, state: State, damping: Damping) -> dict[str, Tensor]:
    parts = [spectra(block.block, own, damping) for own in block.states(state)]
    return {name: _of_parts(name, torch.stack([part[name] for part in parts])) for name in parts[0]}


def _of_parts(name: str, values: Tensor) -> Tensor:
    """A whole has the sum of its blocks' traces and the largest of their condition numbers; of ρ the mean is told."""
    return {"trace": values.sum(), "condition": values.max()}.get(_quantity(name), values.mean())


def _of_roots(
    factors: Mapping[str, tuple[Tensor, Tensor]], roots: Mapping[str, Tensor], exponent: float
) -> dict[str, Tensor]:
    """Of factors and their ρ by side; the roots' largest eigenvalues are that power of the smallest at the refresh."""
    found: dict[str, Tensor] = {}
    for side, (factor, rho) in factors.items():
        found |= {
            f"trace_{side}": _trace(factor),
            f"damping_{side}": rho.mean(),
            f"condition_{side}": ((_norms(factor) + rho) * _norms(roots[side]) ** (1 / exponent)).clamp(min=1).max(),
        }
    return found


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.ndim == 1 else trace(factor)


def _norms(matrix: Tensor) -> Tensor:
    """The norm of a factor, 0-dim, or those of its blocks, (blocks,)."""
    return _norm(matrix) if matrix.ndim == 1 else block_diagonal.measure(_norm, matrix)


def _norm(matrix: Tensor) -> Tensor:
    """Spectral norm of a factor, from a cold start; a vector is a diagonal."""
    if matrix.ndim == 1:
        return matrix.abs().amax()
    start = matrix.new_zeros(matrix.shape[1], min(DIRECTIONS, *matrix.shape))
    return spectral_norm(matrix, start, ITERATIONS)[0]


def _quantity(name: str) -> str:
    """A name without the factor that it is of."""
    return name.rstrip("ABLR").rstrip("_")


def role_of(layer: Layer) -> str:
    """`attention`, `mlp`, `embedding` (a tied weight too), `head` (the one that the model names) or `other`."""
    if any(isinstance(module, nn.Embedding) for module in layer.modules):
        return "embedding"
    if layer.is_head:
        return "head"
    return next((role for role, pattern in ROLES.items() if pattern.search(layer.name)), "other")


# How layers are summed up: the worst condition number, and else what an average layer has.
_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "condition": max,
    "update_rms": lambda values: math.sqrt(sum(value**2 for value in values) / len(values)),
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def report(curvature: Curvature, record: StepRecord, step: int, by: str) -> dict[str, float]:
    """Every number of the log, `curvature/<role or layer>/<quantity>`; the same on every rank.

    Where layers are spread over ranks it is a collective, since only who holds a layer can tell.

    Args:
        curvature: the layers; those without a preconditioner yet are left out.
        record: what was observed; left out unless it is of `step`.
        step: the last step that was made.
        by: `role`, with means over the layers of a role (the largest of condition numbers), or `layer`.
    """
    held = [layer for layer in curvature.layers.values() if layer.held]
    known = {layer.name: _numbers(curvature, layer, record, step) for layer in held}
    overflows = {layer.name: int(layer.overflows) for layer in held}
    known, overflows = curvature.sharing.from_all(known), curvature.sharing.from_all(overflows)
    gathered: dict[str, list[float]] = {}
    for name, found in known.items():
        place = role_of(curvature.layers[name]) if by == "role" else name
        for quantity, value in found.items():
            gathered.setdefault(f"curvature/{place}/{quantity}", []).append(value)
    summary = {
        key: _SUMMARIES.get(_quantity(key.rpartition("/")[2]), _mean)(values) for key, values in gathered.items()
    }
    return summary | {
        "curvature/refresh_seconds": curvature.refresh_seconds,
        "curvature/failed_refreshes": curvature.failed_refreshes,
        "curvature/dropped_statistics": curvature.dropped_statistics,
        "curvature/overflowed_updates": sum(overflows.values()),
    }


def _numbers(curvature: Curvature, layer: Layer, record: StepRecord, step: int) -> dict[str, float]:
    """Of one layer, by quantity; nothing before its first preconditioner."""
    if not layer.refreshes:
        return {}
    try:
        found = dict(spectra(layer.block, layer.state, curvature.damping_of(layer)))
    except DecompositionError:  # under the spectral rule; the refresh has warned of it
        found = {}
    if record.step == step and layer.name in record.update_rms:
        found["update_rms"] = record.update_rms[layer.name]
    return {quantity: float(value) for quantity, value in found.items()}
