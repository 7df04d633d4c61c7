"""What the curvature of a model looks like while it trains, as numbers for a log.

Nothing here changes a step. Off observed steps nothing is computed; on them a few norms stay on the device until
`report` is asked for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_so2.curvature.spectrum import quantity_of
from hf_so2.linalg import DecompositionError
from hf_so2.optim.layer import Layer
from hf_so2.optim.preconditioned import LayerUpdate, over_parts
from hf_so2.optim.statistics import Curvature

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
        key: _SUMMARIES.get(quantity_of(key.rpartition("/")[2]), _mean)(values) for key, values in gathered.items()
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
        found = layer.block.spectra(layer.state, curvature.damping_of(layer))
    except DecompositionError:  # under the spectral rule; the refresh has warned of it
        found = {}
    if record.step == step and layer.name in record.update_rms:
        found["update_rms"] = record.update_rms[layer.name]
    return {quantity: float(value) for quantity, value in found.items()}
