"""Layers of one shape, processed as one stack. For small matrices, kernel launches cost a GPU more than the work."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from hf_so2.curvature import GradientBlock, State
from hf_so2.damping import Damping
from hf_so2.linalg import FAILURES
from hf_so2.weights.layer import Layer

T = TypeVar("T")

# The gradients of a stack have at most this many bytes together. Copies pay off only for small matrices, and half of
# this already keeps a GPU busy.
STACK_BYTES = 128 << 20


def stack_bytes(device: torch.device) -> int:
    """The limit on a device. It is 0 on a CPU: a CPU has no launches to save, and copies are slow there."""
    return 0 if device.type == "cpu" else STACK_BYTES


class StackedState(State):
    """The states of several layers as one, with a leading dimension. A tensor is copied when it is first read."""

    def __init__(self, members: Sequence[State]) -> None:
        super().__init__()
        self._members = members

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.stack([member[name] for member in self._members])
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members[0]

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return self[name] if name in self else default  # noqa: SIM401  # dict.get does not ask __missing__

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return {name: self[name] for name in self._members[0]}.items()

    def write_back(self, names: Iterable[str]) -> None:
        """Write these tensors back to the members."""
        for name in names:
            torch._foreach_copy_([member[name] for member in self._members], list(self[name].unbind()))


def stacks(items: Iterable[T], layer_of: Callable[[T], Layer]) -> Iterator[list[T]]:
    """The items in lists. The layers of a list have the same block, shape, dtype, device and damping.

    Only layers that this rank holds are stacked. Where nothing is stacked, each item has a list of its own and is
    yielded at once.
    """
    waiting: dict[tuple[object, ...], list[T]] = {}
    for item in items:
        layer = layer_of(item)
        most = stack_bytes(layer.device) // layer.nbytes
        if most < 2 or not layer.held or not _has_two_matrix_sides(layer):
            yield [item]
            continue
        key = (layer.block, layer.shape, layer.dtype, layer.device, layer.damping)
        together = waiting.setdefault(key, [])
        together.append(item)
        if len(together) == most:
            yield waiting.pop(key)
    yield from waiting.values()


def _has_two_matrix_sides(layer: Layer) -> bool:
    # All others are embeddings and heads. A model has one of each.
    return not (layer.adapter.one_hot or layer.is_head or layer.head)


def in_stack(
    verb: Callable[[State, Tensor], Tensor], layers: Sequence[Layer], matrices: Sequence[Tensor]
) -> Tensor | None:
    """What `verb` of the block makes of a matrix of each layer, (layers, fan_out, fan_in).

    None if linear algebra fails.
    """
    try:
        if len(layers) == 1:
            return verb(layers[0].state, matrices[0]).unsqueeze(0)
        return verb(StackedState([layer.state for layer in layers]), torch.stack(list(matrices)))
    except FAILURES:
        return None


def observe_stack(together: Sequence[tuple[Layer, Tensor | None]]) -> list[State]:
    """The statistics of a stack's gradients, one state a layer.

    The state is empty for a layer that is not held. It holds a number that is not finite if linear algebra fails.
    """
    layers = [layer for layer, _ in together]
    gradients = [gradient for _, gradient in together if gradient is not None]
    if not gradients:
        return [{} for _ in layers]
    observe = cast(GradientBlock, layers[0].block).observe_gradient
    try:
        if len(layers) == 1:
            return [observe(layers[0].state, gradients[0])]
        found = observe(StackedState([layer.state for layer in layers]), torch.stack(gradients))
        return [{name: value[index] for name, value in found.items()} for index in range(len(layers))]
    except FAILURES:
        if len(layers) > 1:
            return [observe_stack([pair])[0] for pair in together]
        return [{"failed": gradients[0].new_full((), torch.nan)}]


def refresh_stack(layers: Sequence[Layer], damping: Damping) -> dict[str, str | None]:
    """Rebuild the preconditioners of a stack. Returns the error by layer, None for success."""
    block = layers[0].block
    try:
        if len(layers) == 1:
            block.refresh(layers[0].state, damping)
        else:
            stacked = StackedState([layer.state for layer in layers])
            block.refresh(stacked, damping)
            stacked.write_back(block.refreshed)
    except FAILURES as error:
        if len(layers) == 1:
            return {layers[0].name: str(error)}
        return {name: one for layer in layers for name, one in refresh_stack([layer], damping).items()}
    return {layer.name: None for layer in layers}
