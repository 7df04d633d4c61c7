"""The curvature of a model during training, as numbers for a log.

Nothing here changes a step. Steps that are not observed compute nothing. An observed step keeps a few norms on the
device until `report` is called.
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

# The first pattern that matches a parameter's name decides. If none matches, the role is "other". BERT and similar
# models name the two halves of an MLP as parts of the layer itself.
ROLES = {
    "attention": re.compile(r"attn|[aA]ttention"),
    "mlp": re.compile(
        r"mlp|ffn|feed_forward|DenseReluDense|experts?\b|\bff\b|\bfc|\blayer\.\d+\.(intermediate|output)\."
    ),
}


def role_of(layer: Layer) -> str:
    """`attention`, `mlp`, `embedding` (also a tied weight), `head` (the head that the model names) or `other`."""
    if any(isinstance(module, nn.Embedding) for module in layer.modules):
        return "embedding"
    if layer.is_head:
        return "head"
    return next((role for role, pattern in ROLES.items() if pattern.search(layer.name)), "other")


# How layers are summarized: by the largest condition number, and by the mean of every other quantity.
_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "condition": max,
    "update_rms": lambda values: math.sqrt(sum(value**2 for value in values) / len(values)),
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def report(curvature: Curvature, record: StepRecord, step: int, by: str) -> dict[str, float]:
    """Every number of the log, `curvature/<role or layer>/<quantity>`; the same on every rank.

    A collective if layers are spread over ranks, since only ranks that hold a layer know its numbers.

    Args:
        curvature: the layers. Layers without a preconditioner are left out.
        record: the observed values. They are left out unless they belong to `step`.
        step: the last step that was made.
        by: `layer`, or `role` for the mean over the layers of a role (for condition numbers, the largest).
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
    """The numbers of one layer, by quantity; empty before its first preconditioner."""
    if not layer.refreshes:
        return {}
    try:
        found = layer.block.spectra(layer.state, curvature.damping_of(layer))
    except DecompositionError:  # under the spectral rule; the refresh has already warned
        found = {}
    if record.step == step and layer.name in record.update_rms:
        found["update_rms"] = record.update_rms[layer.name]
    return {quantity: float(value) for quantity, value in found.items()}
