"""Norm control on several ranks that hold the same layers, and so make the same updates each for itself.

What linear algebra does to one of them alone would part their weights for ever: nothing brings them together again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_so2.distributed import gather_objects, sum_over_ranks, world
from hf_so2.optim.layer import Layer
from hf_so2.optim.norm_control import LEFT_OUT, MAY_FAIL, RETRIED, control
from hf_so2.optim.preconditioned import LayerUpdate
from hf_so2.optim.settings import Settings
from hf_so2.optim.sharing import Sharing

# Worse than any way to come by an update.
NOT_HELD = LEFT_OUT + 1


def may_part(sharing: Sharing, layers: Sequence[Layer], settings: Settings) -> bool:
    """Whether ranks with the same layers could come by different updates."""
    has_twins = sharing.holders > 1 and settings.norm_control in MAY_FAIL
    return has_twins and not all(layer.block.orthogonal for layer in layers)


def control_alike(
    layers: Sequence[Layer], updates: Sequence[LayerUpdate | None], settings: Settings, sharing: Sharing
) -> None:
    """Apply a norm control that looks at one layer at a time to the updates of this rank, alike on all that hold one.

    A collective where ranks could come by different ones.

    Args:
        layers: the same ones in the same order on every rank.
        updates: of each layer; None where it is not held.
    """
    if not may_part(sharing, layers, settings):
        control([update for update in updates if update is not None], settings)
        return
    rank, ranks = world()
    levels = torch.zeros(ranks, len(layers), dtype=torch.int64, device=layers[0].device)
    found = control([update for update in updates if update is not None], settings)
    levels[rank] = torch.tensor([found.get(layer.name, NOT_HELD) for layer in layers])
    sum_over_ranks([levels])
    for update, layer, of_ranks in zip(updates, layers, levels.mT.tolist(), strict=True):
        if any(level in (RETRIED, LEFT_OUT) for level in of_ranks):
            _take(update, layer, of_ranks, MAY_FAIL[settings.norm_control])


def _take(update: LayerUpdate | None, layer: Layer, levels: Sequence[int], kept: Sequence[str]) -> None:
    """What the first of the ranks made that had the least trouble; `kept` is in the state for the next step."""
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
