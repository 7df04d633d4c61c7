"""All preconditioned weights together: their gradients, and their updates under one norm control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_so2.distributed import is_sharded, local, sum_over_ranks
from hf_so2.engine.controlled import control, control_alike, may_part
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.engine.preconditioned import Entry, LayerUpdate, Member, layer_updates
from hf_so2.engine.sharded import any_sharded, sharded_updates
from hf_so2.engine.statistics import Curvature
from hf_so2.engine.step_record import StepRecord
from hf_so2.engine.step_settings import StepSettings
from hf_so2.parallel.sharing import Sharing
from hf_so2.weights.layer import Layer, statistics_dtype
from hf_so2.weights.stacks import stacks


def with_gradients(groups: Iterable[dict[str, Any]], curvature: Curvature) -> dict[str, Tensor]:
    """The weights that have a gradient, by the name of each of their layers that is not idle.

    Also moves or casts a layer's state if its weight was moved or cast.
    """
    found: list[tuple[Sequence[Layer], Tensor]] = []
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            layers = curvature.layers_of.get(name, ())
            for layer in layers:
                layer.follow(parameter.device, statistics_dtype(parameter.dtype))
            if parameter.grad is not None and layers:
                found.append((layers, parameter))
    _tell_idle([(layers, weight.grad) for layers, weight in found if weight.grad is not None])
    return {layer.name: weight for layers, weight in found for layer in layers if not layer.is_idle}


def _tell_idle(found: Iterable[tuple[Sequence[Layer], Tensor]]) -> None:
    """Set `is_idle` of each matrix of a stack: whether no token has reached it. A collective if stacks are sharded."""
    stacked = [(layers, gradient) for layers, gradient in found if layers[0].adapter.index is not None]
    reached = [_reached(layers, gradient) for layers, gradient in stacked]
    sum_over_ranks([flags for flags, (_, gradient) in zip(reached, stacked, strict=True) if is_sharded(gradient)])
    for flags, (layers, _) in zip(reached, stacked, strict=True):
        for layer, is_reached in zip(layers, flags.tolist(), strict=True):
            layer.is_idle = not is_reached


def _reached(layers: Sequence[Layer], gradient: Tensor) -> Tensor:
    """For each matrix of a stack, whether this rank's part of its gradient is not zero, (layers,), int64."""
    if is_sharded(gradient):
        parts = [local(gradient, layer.adapter.window) for layer in layers]
        return torch.stack([part.any() for part in parts]).to(torch.int64)
    return gradient.flatten(1).any(dim=1).to(torch.int64)


def second_order_updates(
    parameters: Mapping[str, Member],
    states: Mapping[Tensor, dict[str, Any]],
    curvature: Curvature,
    settings: StepSettings,
    record: StepRecord,
    step: int,
) -> Iterator[LayerUpdate]:
    """The updates of all weights that have a preconditioner and a gradient, ready to be applied; equal on all ranks.

    If nothing needs all updates together, the iterator makes each one when it is asked for. The memory of the updates
    before can then be used again. Allocating new memory takes longer than most of the work on it.

    Args:
        parameters: group and parameter by name, including the biases that are a column of a weight.
        states: the optimizer's state by parameter, see `moments`.
        curvature: the layers.
        settings: momentum and norm control.
        record: what telemetry records of this step.
        step: number of the step.
    """
    entries = [
        (layer, [parameters[member] for member in (name, layer.bias or "") if member in parameters])
        for name in parameters
        for layer in curvature.layers_of.get(name, ())
        if layer.refreshes and not layer.building and not layer.is_idle
    ]
    for layer, ((group, _), *_) in entries:
        layer.momentum = group.get("momentum", settings.momentum)  # checkpoints of earlier versions lack it
    sharing = curvature.sharing
    if (
        NORM_CONTROLS[settings.norm_control].of_the_whole_model
        or record.enabled
        or sharing.is_spread
        or any(map(any_sharded, entries))
        or may_part(sharing, [layer for layer, _ in entries], settings)
    ):
        yield from _together(entries, states, sharing, settings, record, step)
        return
    for together in stacks(entries, lambda entry: entry[0]):
        updates = layer_updates(together, states, settings)
        control(updates, settings)
        yield from updates


def _together(
    entries: Sequence[Entry],
    states: Mapping[Tensor, dict[str, Any]],
    sharing: Sharing,
    settings: StepSettings,
    record: StepRecord,
    step: int,
) -> list[LayerUpdate]:
    """All updates at once. A collective if weights or layers are spread over ranks."""
    at_the_end = NORM_CONTROLS[settings.norm_control].of_the_whole_model
    whole = [entry for entry in entries if not any_sharded(entry)]
    of_stacks = (layer_updates(together, states, settings) for together in stacks(whole, lambda entry: entry[0]))
    made = {update.layer.name: update for together in of_stacks for update in together}
    updates = [made[layer.name] for layer, _ in whole]  # in the same order on all ranks
    if not at_the_end:
        held = [update if update.layer.held else None for update in updates]
        control_alike([layer for layer, _ in whole], held, settings, sharing)
    sharing.send_updates((update.layer, update.update) for update in updates)
    updates += sharded_updates(sharing, filter(any_sharded, entries), states, settings)
    record.before_norm_control(updates)
    if at_the_end:
        control(updates, settings)
    record.after_norm_control(updates, step)
    return updates
