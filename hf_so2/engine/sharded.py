"""The steps of sharded weights (FSDP2), whose gradients no rank has.

Momentum, weight decay and the step itself are those of entries, and each rank makes them for its part. What is to be
preconditioned is gathered where the layer is held, a few layers at a time, and of the update every rank gets its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_so2.distributed import Part, is_sharded, local, split_of
from hf_so2.engine.controlled import control_alike
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.engine.preconditioned import Entry, LayerUpdate, Member, directions, matrix_of, moments
from hf_so2.engine.step_settings import StepSettings
from hf_so2.errors import ConfigurationError
from hf_so2.parallel.sharing import Sharing
from hf_so2.weights.layer import Layer

NO_ADAPTIVE_DAMPING = "is not supported with FSDP2, which would take the loss with parameters of before the step"


def any_sharded(entry: Entry) -> bool:
    """Whether of a layer's weight or bias this rank has a part alone."""
    return any(is_sharded(parameter) for _, parameter in entry[1])


def sharded_updates(
    sharing: Sharing, entries: Iterable[Entry], states: Mapping[Tensor, dict[str, Any]], settings: StepSettings
) -> list[LayerUpdate]:
    """This rank's parts of the layers' updates, after a norm control that looks at one layer at a time. A collective.

    Args:
        sharing: who holds which layer.
        entries: each layer, with group and parameter of its weight and of the bias that goes with it; the same ones in
            the same order on every rank.
        states: the optimizer's state by parameter.
        settings: momentum, its order and Nesterov's variant, norm control.

    Raises:
        ConfigurationError: damping is to be adaptive, which takes the loss in the middle of a step.
    """
    members = {layer.name: (layer, its_members) for layer, its_members in entries}
    if members and settings.adaptive_damping:
        raise ConfigurationError("adaptive_damping", True, NO_ADAPTIVE_DAMPING)
    updates: list[LayerUpdate] = []
    for together in sharing.rounds(layer for layer, _ in members.values()):
        of_round = [members[layer.name] for layer in together]
        steps = [_Step(layer, its_own, *moments(layer, its_own, states, settings)) for layer, its_own in of_round]
        updates += _made(sharing, steps, settings)
    return updates


@dataclass
class _Step:
    """A layer with this rank's parts of its gradient and of what is to be preconditioned, by member."""

    layer: Layer
    members: Sequence[Member]
    gradients: list[Tensor]
    averages: list[Tensor]

    def parts(self, tensors: Sequence[Tensor]) -> list[Part]:
        """Parts that are spread as the members are."""
        return [
            Part(tensor, parameter, self.layer.owner)
            for tensor, (_, parameter) in zip(tensors, self.members, strict=True)
        ]

    def by_member(self, update: Tensor) -> list[Tensor]:
        """A matrix (fan_out, fan_in), with a column for the bias if there is one, as weight and bias are stored."""
        biases = len(self.members) - 1
        weight = self.layer.adapter.matrix(update[:, : update.shape[1] - biases])
        return [weight, *([update[:, -1]] * biases)]

    def part_of_update(self, parts: Sequence[Tensor]) -> LayerUpdate:
        """What this rank is going to apply."""
        update = _joined(parts)
        pieces = []
        for piece, (group, parameter) in zip(update.split([p.numel() for p in parts]), self.members, strict=True):
            part = local(parameter)
            pieces.append((part, piece.view(part.shape), group))
        group, weight = self.members[0]
        copies = len(split_of(weight).copies)
        return LayerUpdate(
            self.layer, _joined(self.gradients), _joined(self.averages), update, group, pieces, copies=copies
        )


def _made(sharing: Sharing, steps: Sequence[_Step], settings: StepSettings) -> list[LayerUpdate]:
    """Gather, precondition and hand out the layers of one round."""
    averages = _whole(sharing, steps, [step.averages for step in steps])
    gradients = averages
    if NORM_CONTROLS[settings.norm_control].needs == "gradient" and settings.momentum_order == "before":
        gradients = _whole(sharing, steps, [step.gradients for step in steps])
    made: list[Tensor | None] = []
    held: list[LayerUpdate | None] = []
    for step, gradient, average in zip(steps, gradients, averages, strict=True):
        if gradient is None or average is None:
            made += [None] * len(step.members)
            held.append(None)
            continue
        (update,) = directions([step.layer], [average], settings)
        held.append(LayerUpdate(step.layer, gradient, average, update, step.members[0][0]))
        made += step.by_member(update)
    if not NORM_CONTROLS[settings.norm_control].of_the_whole_model:
        control_alike([step.layer for step in steps], held, settings, sharing)
    spread = [part for step in steps for part in step.parts(step.averages)]
    own = iter(sharing.scatter_from_holders(made, spread))
    return [step.part_of_update([next(own) for _ in step.members]) for step in steps]


def _whole(sharing: Sharing, steps: Sequence[_Step], tensors: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
    """Matrices (fan_out, fan_in), the bias's column included, out of every rank's parts; None where not held."""
    parts = [part for step, own in zip(steps, tensors, strict=True) for part in step.parts(own)]
    gathered = iter(sharing.gather_to_holders(parts))
    matrices: list[Tensor | None] = []
    for step in steps:
        found = [whole for whole in (next(gathered) for _ in step.members) if whole is not None]
        matrices.append(matrix_of(step.layer, found) if found else None)
    return matrices


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One vector, a view where it can be."""
    return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
