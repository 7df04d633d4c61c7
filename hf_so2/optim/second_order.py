"""All preconditioned weights together: their gradients, and their updates under one norm control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_so2.optim.layer import Layer
from hf_so2.optim.norm_control import NORM_CONTROLS, OF_THE_WHOLE_MODEL
from hf_so2.optim.preconditioned import Column, LayerUpdate, layer_update
from hf_so2.optim.settings import Settings
from hf_so2.optim.statistics import Curvature
from hf_so2.optim.telemetry import StepRecord


def matrix_gradients(groups: Iterable[dict[str, Any]], layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The gradients of these layers, (fan_out, fan_in), of those that have one; a layer follows a weight that moved."""
    gradients = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in layers:
                layers[name].move_to(parameter.device)
                if parameter.grad is not None:
                    gradients[name] = layers[name].adapter.matrix(parameter.grad)
    return gradients


def second_order_updates(
    parameters: Mapping[str, Column],
    states: Mapping[Tensor, dict[str, Any]],
    curvature: Curvature,
    settings: Settings,
    record: StepRecord,
    step: int,
) -> list[LayerUpdate]:
    """The updates of all weights that have a preconditioner and a gradient, ready to be applied; alike on all ranks.

    Args:
        parameters: group and parameter by name, biases that go with a weight among them.
        states: the optimizer's state by parameter, see `layer_update`.
        curvature: the layers.
        settings: momentum and norm control.
        record: of what telemetry wants to know of this step.
        step: its number.
    """
    updates = [
        layer_update(layer, *parameters[name], parameters.get(layer.bias or ""), states, settings)
        for name in parameters
        if (layer := curvature.layers.get(name)) and not layer.building
    ]
    control = settings.norm_control
    if control not in OF_THE_WHOLE_MODEL:
        NORM_CONTROLS[control]([update for update in updates if update.layer.held], settings)
    curvature.sharing.send_updates((update.layer, update.update) for update in updates)
    record.before_norm_control(updates)
    if control in OF_THE_WHOLE_MODEL:
        NORM_CONTROLS[control](updates, settings)
    record.after_norm_control(updates, step)
    return updates
