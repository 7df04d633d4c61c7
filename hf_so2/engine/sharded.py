"""The steps of sharded weights (FSDP2). Each rank has only a part of such a weight and of its gradient.

Momentum, weight decay and the step itself act on each entry alone, so each rank computes them for its own part.
Preconditioning needs the whole matrix. The ranks that hold the layer gather the parts, precondition them, and send each
rank its part of the update. They do so for a few layers at a time.
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
    """Whether this rank has only a part of the layer's weight or bias."""
    return any(is_sharded(parameter) for _, parameter in entry[1])


def sharded_updates(
    sharing: Sharing, entries: Iterable[Entry], states: Mapping[Tensor, dict[str, Any]], settings: StepSettings
) -> list[LayerUpdate]:
    """This rank's parts of the layers' updates. A collective.

    A norm control that looks at one layer at a time is already applied. A norm control of the whole model is not.

    Args:
        sharing: which ranks hold which layer.
        entries: each layer, with group and parameter of its weight and of its bias; the same ones in the same order on
            every rank.
        states: the optimizer's state by parameter.
        settings: momentum, its order and Nesterov's variant, norm control.

    Raises:
        ConfigurationError: `adaptive_damping` is set, which needs the loss in the middle of a step.
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
    """A layer, with this rank's parts of its gradient and of its average of gradients, by member: weight, then bias."""

    layer: Layer
    members: Sequence[Member]
    gradients: list[Tensor]
    averages: list[Tensor]

    def parts(self, tensors: Sequence[Tensor]) -> list[Part]:
        """The tensors as parts, sharded as the members are."""
        return [
            Part(tensor, parameter, self.layer.owner, self.layer.adapter.window)
            for tensor, (_, parameter) in zip(tensors, self.members, strict=True)
        ]

    def by_member(self, update: Tensor) -> list[Tensor]:
        """Split a matrix (fan_out, fan_in) into weight and bias, in the layout of the parameters."""
        biases = len(self.members) - 1
        weight = self.layer.adapter.as_stored(update[:, : update.shape[1] - biases])
        return [weight, *([update[:, -1]] * biases)]

    def part_of_update(self, parts: Sequence[Tensor]) -> LayerUpdate:
        """This rank's part of the update, out of the parts of its members."""
        update = _joined(parts)
        pieces = []
        for piece, (group, parameter) in zip(update.split([p.numel() for p in parts]), self.members, strict=True):
            part = local(parameter, self.layer.adapter.window)
            pieces.append((part, piece.view(part.shape), group))
        group, weight = self.members[0]
        copies = len(split_of(weight).copies)
        return LayerUpdate(
            self.layer, _joined(self.gradients), _joined(self.averages), update, group, pieces, copies=copies
        )


def _made(sharing: Sharing, steps: Sequence[_Step], settings: StepSettings) -> list[LayerUpdate]:
    """The updates of the layers of one round: gather, precondition, scatter."""
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
    """Whole matrices (fan_out, fan_in), the bias's column included, gathered from all ranks; None where not held."""
    parts = [part for step, own in zip(steps, tensors, strict=True) for part in step.parts(own)]
    gathered = iter(sharing.gather_to_holders(parts))
    matrices: list[Tensor | None] = []
    for step in steps:
        found = [whole for whole in (next(gathered) for _ in step.members) if whole is not None]
        matrices.append(matrix_of(step.layer, found) if found else None)
    return matrices


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts in one vector: a view if there is one part, else a copy."""
    return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
