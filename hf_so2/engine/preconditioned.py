"""From a raw gradient to the update of one preconditioned weight: momentum, then curvature, or vice versa."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_so2.curvature.base import RotatingBlock, State
from hf_so2.distributed import local, sum_over_ranks, world
from hf_so2.engine.step_settings import StepSettings
from hf_so2.linalg import matmul_precision
from hf_so2.weights.layer import Layer
from hf_so2.weights.stacks import in_stack

Member = tuple[dict[str, Any], Tensor]
Entry = tuple[Layer, Sequence[Member]]


@dataclass
class LayerUpdate:
    """One layer's update, or this rank's part of it if the weight is sharded.

    Args:
        layer: the layer, with shape, block and state. Norm control keeps its own tensors in this state too.
        gradient: G, the raw gradient of this step, (fan_out, fan_in), in the dtype of the statistics.
        moment: the tensor that was preconditioned: the moving average of G. It is G itself with `momentum_order`
            "after", or if the block keeps the momentum.
        update: the direction of the step, (fan_out, fan_in). Norm control scales it in place. If other ranks hold the
            layer, a buffer of zeros for the update that they will send.
        group: the weight's parameter group: `lr` and `weight_decay` with width multipliers and schedule, and Adam's
            constants.
        pieces: what the step moves: the weight, and the bias if it is the last column. For each of them, a view of the
            parameter, the view of `update` that belongs to it, and its group.
        copies: 0 for a whole update. For a part, the number of ranks that have the same part; `gradient`, `moment` and
            `update` are then vectors, with the bias's part at the end.
    """

    layer: Layer
    gradient: Tensor
    moment: Tensor
    update: Tensor
    group: dict[str, Any]
    pieces: Sequence[tuple[Tensor, Tensor, dict[str, Any]]] = ()
    copies: int = 0

    def change(self) -> Tensor:
        """The change that `apply` makes, in the update's shape and dtype. Only for a whole update."""
        columns = [
            -group["lr"] * (update + group["weight_decay"] * parameter.to(update.dtype))
            for parameter, update, group in self.pieces
        ]
        return torch.cat(columns, dim=1)

    def apply(self) -> None:
        """Decoupled weight decay, then the step."""
        for parameter, update, group in self.pieces:
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update.to(parameter.dtype), alpha=group["lr"])


def layer_updates(
    entries: Sequence[Entry], states: Mapping[Tensor, dict[str, Any]], settings: StepSettings
) -> list[LayerUpdate]:
    """The updates of a stack of unsharded weights, before norm control.

    Args:
        entries: each layer, with group and parameter of its weight and of its bias. The layer has been refreshed at
            least once, and the weight has a gradient.
        states: as for `moments`.
        settings: momentum, its order and Nesterov's variant.
    """
    pairs = []
    for layer, members in entries:
        gradients, averages = moments(layer, members, states, settings)
        gradient = matrix_of(layer, gradients)
        pairs.append((gradient, gradient if averages is gradients else matrix_of(layer, averages)))
    layers, found = [layer for layer, _ in entries], [moment for _, moment in pairs]
    is_held = layers[0].held
    updates = directions(layers, found, settings) if is_held else [torch.zeros_like(moment) for moment in found]
    return [_update(entry, *pair, update) for entry, pair, update in zip(entries, pairs, updates, strict=True)]


def _update(entry: Entry, gradient: Tensor, moment: Tensor, update: Tensor) -> LayerUpdate:
    layer, ((group, weight), *bias) = entry
    pieces = [(layer.adapter.matrix(weight), update[:, : update.shape[1] - len(bias)], group)]
    pieces += [(vector.unsqueeze(1), update[:, -1:], its_group) for its_group, vector in bias]
    return LayerUpdate(layer, gradient, moment, update, group, pieces)


def moments(
    layer: Layer, members: Sequence[Member], states: Mapping[Tensor, dict[str, Any]], settings: StepSettings
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients and the tensors to precondition, of weight and bias: this rank's parts if these are sharded.

    Also counts a step of the layer.

    Args:
        layer: the layer.
        members: group and parameter of the weight and of its bias.
        states: the optimizer's state by parameter. It keeps the averages of gradients as `momentum_buffer`, sharded as
            the parameter is.
        settings: momentum, its order and Nesterov's variant.
    """
    layer.steps += 1
    window = layer.adapter.window  # a bias has no part in a matrix that is one of several
    gradients = [local(p.grad, window).to(layer.dtype) for _, p in members if p.grad is not None]
    if settings.momentum_order == "after" or layer.rotating:
        return gradients, gradients
    averages = []
    for (_, parameter), gradient in zip(members, gradients, strict=True):
        state = states[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        averages.append(_averaged(gradient, local(state["momentum_buffer"], window), layer, settings))
    return gradients, averages


def matrix_of(layer: Layer, tensors: Sequence[Tensor]) -> Tensor:
    """The matrix (fan_out, fan_in) of the weight's tensor, with the bias's tensor as the last column."""
    weight, *bias = tensors
    matrix = layer.adapter.as_matrix(weight)
    return torch.cat([matrix, *(vector.unsqueeze(1) for vector in bias)], dim=1) if bias else matrix


def directions(layers: Sequence[Layer], found: Sequence[Tensor], settings: StepSettings) -> list[Tensor]:
    """The preconditioned gradients of a stack, (fan_out, fan_in), or their averages with `momentum_order` "after".

    The layers' states keep these averages, on the ranks that hold the layers, also under the name `momentum_buffer`.

    Args:
        layers: layers of one block and shape.
        found: the tensor to precondition of each layer.
        settings: momentum, its order and Nesterov's variant.
    """
    updates = _preconditioned(layers, found, settings)
    if settings.momentum_order == "before":
        return updates
    return [_averaged_update(layer, update, settings) for layer, update in zip(layers, updates, strict=True)]


def _averaged_update(layer: Layer, update: Tensor, settings: StepSettings) -> Tensor:
    if "momentum_buffer" not in layer.state:
        layer.state["momentum_buffer"] = torch.zeros_like(update)
    # A copy: norm control works in place, and the average may be the buffer itself.
    return _averaged(update, layer.state["momentum_buffer"], layer, settings).clone()


def over_parts(updates: Sequence[LayerUpdate], sums: Tensor) -> Tensor:
    """Sums over all entries of each update, (updates,), out of the sums over this rank's parts.

    A collective if weights are sharded. Otherwise the sums are whole already and are returned as they are.
    """
    if not any(update.copies for update in updates):
        return sums
    copies = torch.tensor([update.copies or world()[1] for update in updates], dtype=sums.dtype, device=sums.device)
    total = sums / copies
    sum_over_ranks([total])
    return total


def _preconditioned(layers: Sequence[Layer], gradients: Sequence[Tensor], settings: StepSettings) -> list[Tensor]:
    """`P(G)` of each layer.

    It is zero where `P(G)` overflows, which a finite but huge gradient can cause, and where linear algebra fails. The
    layer counts both cases in `overflows`.
    """
    with matmul_precision(settings.curvature_matmul_precision):
        verb: Callable[[State, Tensor], Tensor] = layers[0].block.precondition
        if (block := layers[0].rotating) is not None:
            verb = block.precondition_rotated
            pairs = zip(layers, gradients, strict=True)
            gradients = [_averaged_rotated(gradient, layer, block, settings) for layer, gradient in pairs]
        update = in_stack(verb, layers, gradients)
        if update is None:
            each = [in_stack(verb, [layer], [gradient]) for layer, gradient in zip(layers, gradients, strict=True)]
            failed = torch.full_like(gradients[0], torch.nan).unsqueeze(0)
            update = torch.cat([failed if one is None else one for one in each])
    is_finite = torch.isfinite(update.sum(dim=(-2, -1)))
    for layer, is_its_finite in zip(layers, is_finite.unbind(), strict=True):
        layer.overflows = layer.overflows + ~is_its_finite  # stays on the device: no synchronization
    # On a CPU the check is free and a copy is not.
    if update.device.type != "cpu" or not bool(is_finite.all()):
        update = torch.where(is_finite[:, None, None], update, torch.zeros_like(update[0]))
    return list(update.unbind())


def _averaged_rotated(gradient: Tensor, layer: Layer, block: RotatingBlock, settings: StepSettings) -> Tensor:
    """The moving average of gradients in the coordinates of the block."""
    rotated, layer.rotated = layer.rotated, None
    if rotated is None:
        rotated = block.rotate(layer.state, gradient)
    # A finite but huge gradient can overflow here. The infinite entry would never leave the average.
    return _averaged(rotated.nan_to_num_(0.0, 0.0, 0.0), layer.state["M"], layer, settings)


def _averaged(value: Tensor, buffer: Tensor, layer: Layer, settings: StepSettings) -> Tensor:
    """The moving average after adding `value`; with Nesterov's momentum one step ahead, as in `torch.optim.Muon`."""
    beta = layer.momentum
    buffer.lerp_(value.to(buffer.dtype), 1 - beta)
    average = buffer.to(value.dtype)
    if settings.nesterov:
        average = value.lerp(average, beta)
    return average / momentum_weight(layer, settings) if layer.block.corrects_momentum else average


def momentum_weight(layer: Layer, settings: StepSettings) -> float:
    """The weight of the average, which starts from zero: after t equal gradients it is this share of one of them."""
    # Nesterov's average is that of one gradient more.
    return 1 - layer.momentum ** (layer.steps + settings.nesterov)
