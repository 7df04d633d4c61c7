"""All preconditioned weights together: their gradients, and their updates under one norm control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_so2.optim.alike import control_alike, may_part
from hf_so2.optim.layer import Layer, statistics_dtype
from hf_so2.optim.norm_control import OF_THE_WHOLE_MODEL, control
from hf_so2.optim.preconditioned import LayerUpdate, Member, layer_update
from hf_so2.optim.settings import Settings
from hf_so2.optim.sharded import Entry, any_sharded, sharded_updates
from hf_so2.optim.sharing import Sharing
from hf_so2.optim.statistics import Curvature
from hf_so2.optim.telemetry import StepRecord


def with_gradients(groups: Iterable[dict[str, Any]], layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The weights of these layers that have a gradient; a layer follows a weight that moved."""
    weights = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in layers:
                layers[name].follow(parameter.device, statistics_dtype(parameter.dtype))
                if parameter.grad is not None:
                    weights[name] = parameter
    return weights


def second_order_updates(
    parameters: Mapping[str, Member],
    states: Mapping[Tensor, dict[str, Any]],
    curvature: Curvature,
    settings: Settings,
    record: StepRecord,
    step: int,
) -> Iterator[LayerUpdate]:
    """The updates of all weights that have a preconditioner and a gradient, ready to be applied; alike on all ranks.

    Where nothing looks at all of them together, each is made when it is asked for, in the memory of those before it:
    fresh memory takes longer to get than most of what is done in it.

    Args:
        parameters: group and parameter by name, biases that go with a weight among them.
        states: the optimizer's state by parameter, see `moments`.
        curvature: the layers.
        settings: momentum and norm control.
        record: of what telemetry wants to know of this step.
        step: its number.
    """
    entries = [
        (layer, [parameters[member] for member in (name, layer.bias or "") if member in parameters])
        for name in parameters
        if (layer := curvature.layers.get(name)) and not layer.building
    ]
    for layer, ((group, _), *_) in entries:
        layer.momentum = group.get("momentum", settings.momentum)  # a checkpoint of an earlier version has none
    sharing = curvature.sharing
    if (
        settings.norm_control in OF_THE_WHOLE_MODEL
        or record.enabled
        or sharing.is_spread
        or any(map(any_sharded, entries))
        or may_part(sharing, [layer for layer, _ in entries], settings)
    ):
        yield from _together(entries, states, sharing, settings, record, step)
        return
    for layer, members in entries:
        update = layer_update(layer, members, states, settings)
        control([update], settings)
        yield update


def _together(
    entries: Sequence[Entry],
    states: Mapping[Tensor, dict[str, Any]],
    sharing: Sharing,
    settings: Settings,
    record: StepRecord,
    step: int,
) -> list[LayerUpdate]:
    """All updates at once; a collective where weights or layers are spread over ranks."""
    at_the_end = settings.norm_control in OF_THE_WHOLE_MODEL
    whole = [entry for entry in entries if not any_sharded(entry)]
    updates = [layer_update(layer, members, states, settings) for layer, members in whole]
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
