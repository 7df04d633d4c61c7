"""What the curvature of a model looks like while it trains, as numbers for a log.

Nothing here changes a step. Off observed steps nothing is computed; on them a few norms stay on the device until
`report` is asked for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_so2.curvature.parts.spectrum import quantity_of
from hf_so2.engine.statistics import Curvature
from hf_so2.engine.step_record import StepRecord
from hf_so2.linalg import DecompositionError
from hf_so2.weights.layer import Layer

LEVELS = ("role", "layer")

# The first pattern found in a parameter's name; whatever matches none is of the role "other". BERT and its kin name the
# two halves of an MLP as parts of the layer itself.
ROLES = {
    "attention": re.compile(r"attn|[aA]ttention"),
    "mlp": re.compile(
        r"mlp|ffn|feed_forward|DenseReluDense|experts?\b|\bff\b|\bfc|\blayer\.\d+\.(intermediate|output)\."
    ),
}


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
