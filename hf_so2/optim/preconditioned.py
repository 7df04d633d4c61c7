"""From a raw gradient to the update of one preconditioned weight: momentum, then curvature, or vice versa."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_so2.linalg import matmul_precision
from hf_so2.optim.layer import Layer

if TYPE_CHECKING:  # the settings name the norm controls of the table, and so come after it
    from hf_so2.optim.settings import Settings


@dataclass
class LayerUpdate:
    """One layer's step in the making.

    Args:
        layer: shape, block and state; norm control keeps its own tensors in the state, beside the block's.
        weight: (fan_out, fan_in) view of the parameter.
        gradient: G, the raw gradient of this step, (fan_out, fan_in), in the dtype of the statistics.
        moment: its moving average (with `momentum_order` "after", G itself): what was preconditioned.
        update: the step's direction, (fan_out, fan_in); scaled in place by norm control. Where another rank holds the
            layer, room for what it will send.
        group: the parameter group: `lr` and `weight_decay` with width multipliers and schedule, Adam's constants.
        bias: group and parameter of the bias that is the matrices' last column, if one is.
    """

    layer: Layer
    weight: Tensor
    gradient: Tensor
    moment: Tensor
    update: Tensor
    group: dict[str, Any]
    bias: Column | None = None

    def change(self) -> Tensor:
        """What `apply` is going to add, of the update's shape and dtype."""
        columns = [
            -group["lr"] * (update + group["weight_decay"] * parameter.to(update.dtype))
            for parameter, update, group in self._parts()
        ]
        return torch.cat(columns, dim=1)

    def apply(self) -> None:
        """Decoupled weight decay, then the step."""
        for parameter, update, group in self._parts():
            _descend(parameter, update, group)

    def _parts(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """The weight with its update and group, and its bias as a column with those of its own."""
        if self.bias is None:
            return [(self.weight, self.update, self.group)]
        group, bias = self.bias
        return [(self.weight, self.update[:, :-1], self.group), (bias.unsqueeze(1), self.update[:, -1:], group)]


def _descend(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(update.to(parameter.dtype), alpha=group["lr"])


Column = tuple[dict[str, Any], Tensor]
NormControl = Callable[[Sequence[LayerUpdate], "Settings"], None]


def layer_update(
    layer: Layer,
    group: dict[str, Any],
    parameter: Tensor,
    bias: Column | None,
    states: Mapping[Tensor, dict[str, Any]],
    settings: Settings,
) -> LayerUpdate:
    """The update of one weight, before norm control.

    Args:
        layer: its statistics, refreshed at least once.
        group: its parameter group.
        parameter: with a gradient.
        bias: group and parameter of the bias that goes with it.
        states: the optimizer's state by parameter. An average of gradients is kept there as `momentum_buffer`, on
            every rank, (fan_out, fan_in) with the bias's column where there is one. One of preconditioned gradients is
            in the layer's state, under the same name, on the ranks that make them.
        settings: momentum, its order and Nesterov's variant.
    """
    assert parameter.grad is not None
    matrix, dtype, state = layer.adapter.matrix, layer.dtype, states[parameter]
    gradient = matrix(parameter.grad).to(dtype)
    if bias is not None:
        assert bias[1].grad is not None
        gradient = torch.cat([gradient, bias[1].grad.to(dtype).unsqueeze(1)], dim=1)
    layer.steps += 1
    moment = gradient
    if settings.momentum_order == "before":
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = parameter.new_zeros(parameter.shape if bias is None else gradient.shape)
        buffer = matrix(state["momentum_buffer"]) if bias is None else state["momentum_buffer"]
        moment = _averaged(gradient, buffer, layer, settings)
    update = _preconditioned(layer, moment, settings) if layer.held else torch.zeros_like(moment)
    if settings.momentum_order == "after" and layer.held:
        if "momentum_buffer" not in layer.state:
            layer.state["momentum_buffer"] = torch.zeros_like(update)
        # A copy, since norm control works in place and the average may be the buffer itself.
        update = _averaged(update, layer.state["momentum_buffer"], layer, settings).clone()
    return LayerUpdate(layer, matrix(parameter), gradient, moment, update, group, bias)


def _preconditioned(layer: Layer, gradient: Tensor, settings: Settings) -> Tensor:
    """`P(G)`; zero where that leaves the range of the dtype, as a finite but huge gradient can make it. Counted."""
    with matmul_precision(settings.curvature_matmul_precision):
        update = layer.block.precondition(layer.state, gradient)
    is_finite = torch.isfinite(update.sum())
    layer.overflows = layer.overflows + ~is_finite  # on the device: nobody waits for it
    return torch.where(is_finite, update, torch.zeros_like(is_finite, dtype=update.dtype))


def _averaged(value: Tensor, buffer: Tensor, layer: Layer, settings: Settings) -> Tensor:
    """The moving average with `value` in it; with Nesterov's momentum one step ahead, as in `torch.optim.Muon`."""
    beta = settings.momentum
    buffer.lerp_(value.to(buffer.dtype), 1 - beta)
    average = buffer.to(value.dtype)
    if settings.nesterov:
        average = value.lerp(average, beta)
    return average / momentum_weight(layer, settings) if layer.block.corrects_momentum else average


def momentum_weight(layer: Layer, settings: Settings) -> float:
    """What an average from zero has seen: after t equal gradients it is this share of one of them."""
    # A look ahead is the average of one gradient more.
    return 1 - settings.momentum ** (layer.steps + settings.nesterov)
