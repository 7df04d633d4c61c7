"""Applies norm control, and keeps it equal on ranks that hold the same layers.

Each of these ranks computes the same updates for itself. If linear algebra fails or is retried on one of them alone,
its weights would differ from those of the others from then on: nothing makes them equal again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hf_so2.distributed import gather_objects, sum_over_ranks, world
from hf_so2.engine.norm_control import NORM_CONTROLS, NormControl
from hf_so2.engine.preconditioned import LayerUpdate
from hf_so2.engine.step_settings import StepSettings
from hf_so2.linalg import FAILURES, retries
from hf_so2.parallel.sharing import Sharing
from hf_so2.weights.layer import Layer
from hf_so2.weights.stacks import stacks

logger = logging.getLogger(__name__)

# How an update was computed. Lower is better.
AT_ONCE, RETRIED, LEFT_OUT = range(3)
# Worse than all of these.
NOT_HELD = LEFT_OUT + 1


def control(updates: Sequence[LayerUpdate], settings: StepSettings) -> dict[str, int]:
    """Apply the norm control of the settings, in place.

    If linear algebra fails for a layer, the right length of its update is unknown. The update is set to zero and
    counted like one that is not finite.

    Returns:
        The outcome by layer: `AT_ONCE`, `RETRIED` or `LEFT_OUT`.
    """
    chosen = NORM_CONTROLS[settings.norm_control]
    if chosen.of_the_whole_model:
        chosen.apply(updates, settings)
        return {u.layer.name: AT_ONCE for u in updates}
    found: dict[str, int] = {}
    for together in stacks(updates, lambda u: u.layer):
        before = retries()
        try:
            chosen.apply(together, settings)
        except FAILURES as error:
            for u in together:
                alone = str(error) if len(together) == 1 else _failure_alone(u, chosen, settings)
                found[u.layer.name] = RETRIED if alone is None else LEFT_OUT
                if alone is not None:
                    _leave_out(u, alone)
            continue
        found |= {u.layer.name: AT_ONCE if retries() == before else RETRIED for u in together}
    return found


def _failure_alone(u: LayerUpdate, chosen: NormControl, settings: StepSettings) -> str | None:
    """Apply norm control to one layer of a stack again, alone. Returns the error, or None.

    The layer may be scaled twice. This gives the same result as scaling it once.
    """
    try:
        chosen.apply([u], settings)
    except FAILURES as error:
        return str(error)
    return None


def _leave_out(u: LayerUpdate, error: str) -> None:
    u.update.zero_()
    u.layer.overflows = u.layer.overflows + 1
    # The log gets the text alone: a handler that keeps log records would keep the error, its frames and so the model.
    logger.warning("%s: norm control failed, the weight is left out of this step: %s", u.layer.name, error)


def may_part(sharing: Sharing, layers: Sequence[Layer], settings: StepSettings) -> bool:
    """Whether ranks that hold the same layers could get different updates."""
    has_twins = sharing.holders > 1 and bool(NORM_CONTROLS[settings.norm_control].kept)
    return has_twins and not all(layer.block.orthogonal for layer in layers)


def control_alike(
    layers: Sequence[Layer], updates: Sequence[LayerUpdate | None], settings: StepSettings, sharing: Sharing
) -> None:
    """Apply a norm control that looks at one layer at a time, with equal results on all ranks that hold a layer.

    A collective if these ranks could get different updates.

    Args:
        layers: the layers, the same ones in the same order on every rank.
        updates: this rank's update of each layer; None where the layer is not held.
        settings: the norm control.
        sharing: which ranks hold which layer.
    """
    found = control([update for update in updates if update is not None], settings)
    if not may_part(sharing, layers, settings):
        return
    rank, ranks = world()
    levels = torch.zeros(ranks, len(layers), dtype=torch.int64, device=layers[0].device)
    levels[rank] = torch.tensor([found.get(layer.name, NOT_HELD) for layer in layers])
    sum_over_ranks([levels])
    for update, layer, of_ranks in zip(updates, layers, levels.mT.tolist(), strict=True):
        if any(level in (RETRIED, LEFT_OUT) for level in of_ranks):
            _take(update, layer, of_ranks, NORM_CONTROLS[settings.norm_control].kept)


def _take(update: LayerUpdate | None, layer: Layer, levels: Sequence[int], kept: Sequence[str]) -> None:
    """Take the update of the rank with the best outcome, the first of equals.

    `kept` names the tensors of the state that norm control needs at the next step. They are taken too.
    """
    rank, source, mine = world()[0], min(range(len(levels)), key=levels.__getitem__), None
    if update is not None and rank == source:
        mine = update.update.cpu(), {name: layer.state[name].cpu() for name in kept if name in layer.state}
    made = gather_objects(mine)[source]
    if update is None or made is None:
        return
    update.update.copy_(made[0])
    layer.overflows = layer.overflows + int(levels[source] == LEFT_OUT) - int(levels[rank] == LEFT_OUT)
    for name in kept:
        layer.state.pop(name, None)
    layer.state |= {name: tensor.to(layer.device) for name, tensor in made[1].items()}
