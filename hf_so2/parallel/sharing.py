"""Which ranks hold which layer, and what they send each other for it.

The ranks form a grid; see `hf_so2.distributed.Grid`. Each layer has one owner, the rank that refreshes its
preconditioner. The layer's column is the owner's column of the grid. The ranks of this column hold the layer. If all
ranks are in one column, every rank holds every layer.

| what | which ranks have it |
|---|---|
| statistics, preconditioner, norm control's state, momentum of preconditioned gradients | the ranks of one column |
| the bases in which EKFAC sees the tokens, momentum of gradients, counters | every rank |

For a sharded weight, the momentum of gradients is sharded too. Only the ranks of its column ever see the whole
gradient, a few layers at a time. An expert or an attention head of which one rank has all goes to this rank's column:
if each layer has one holder, nothing has to be sent for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from hf_so2.curvature import State, Statistic
from hf_so2.distributed import (
    BUCKET_BYTES,
    Cost,
    Grid,
    GridCommunicator,
    Parcel,
    Part,
    gather_objects,
    is_sharded,
    local,
    place,
    send_from_owners,
    sum_over_ranks,
    world,
)
from hf_so2.errors import ConfigurationError
from hf_so2.weights.costs import held_flops, is_square, is_symmetric
from hf_so2.weights.layer import Layer

T = TypeVar("T")


class Sharing:
    """Spreads layers over ranks and sends their tensors.

    Args:
        layers: the layers, the same ones in the same order on every rank.
        fraction: the fraction of ranks that hold a layer; see `Settings.gradient_worker_fraction`.
        refresh_steps: steps between refreshes. It weighs the cost of a refresh against that of preconditioning.
    """

    def __init__(self, layers: Sequence[Layer], fraction: float, refresh_steps: int) -> None:
        self._layers, self._fraction, self._refresh_steps = layers, fraction, refresh_steps
        self._place()
        for layer in layers:
            layer.state = layer.blank_state()

    @property
    def is_spread(self) -> bool:
        """Whether there are layers that this rank does not hold."""
        return self._grid.columns > 1

    @property
    def holders(self) -> int:
        """How many ranks hold each layer."""
        return self._grid.workers

    def settle(self) -> None:
        """Assign the layers to ranks again if a process group has started after the optimizer was built.

        Raises:
            ConfigurationError: the number of ranks has changed since the layers were spread over them.
        """
        _, ranks = world()
        if ranks == self._grid.ranks:
            return
        if self.is_spread:
            allowed = f"is in use with {self._grid.ranks} ranks, which have become {ranks}: build the optimizer anew"
            raise ConfigurationError("gradient_worker_fraction", self._fraction, allowed)
        self._place()
        for layer in self._layers:
            if not layer.held:
                layer.state = layer.blank_state() | {name: layer.state[name] for name in layer.block.observed}

    def _place(self) -> None:
        rank, ranks = world()
        self._grid = Grid.of_fraction(self._fraction, ranks)
        self._communicator = GridCommunicator(self._grid)
        homes = {layer.name: layer.home for layer in self._layers if layer.home is not None}
        owners = place({layer.name: self._cost(layer) for layer in self._layers}, self._grid, homes)
        for layer in self._layers:
            layer.owner = owners[layer.name]
            layer.owned, layer.held = layer.owner == rank, self._communicator.holds(layer.owner)

    def _cost(self, layer: Layer) -> Cost:
        refresh = layer.block.refresh_flops(layer.shape) / self._refresh_steps
        return Cost(refresh, held_flops(layer.block, layer.shape))

    def sum_statistics(self, sums: Iterable[tuple[Layer, Mapping[str, Statistic], State]]) -> None:
        """Add up sums over ranks, in place. On ranks that do not hold the layer, the tensors are invalid afterwards.

        Args:
            sums: for each layer, its statistics and its tensors, both by name; the same ones on every rank.
        """
        self._communicator.sum_to_holders(
            [
                Parcel(value, layer.owner, statistics[name].symmetric and is_square(value))
                for layer, statistics, entry in sums
                for name, value in entry.items()
            ]
        )

    def send_preconditioners(self, layers: Iterable[Layer]) -> None:
        """Send what the owners have refreshed: to the ranks that hold the layer, or to all ranks if all need it."""
        down: list[Parcel] = []
        everywhere: list[Parcel] = []
        for layer in layers:
            for name in layer.block.refreshed:
                tensor = layer.state[name]
                parcel = Parcel(tensor, layer.owner, is_symmetric(name) and is_square(tensor))
                to_all = self.is_spread and name in layer.block.observed
                (everywhere if to_all else down).append(parcel)
        self._communicator.send_to_holders(down)
        send_from_owners(everywhere)

    def rounds(self, layers: Iterable[Layer]) -> Iterator[list[Layer]]:
        """Groups of sharded layers. The whole gradients of one group exist at the same time.

        A group is small enough for the memory of any rank. Its layers have one dtype. Each column has one layer in it,
        or as many as fit into `BUCKET_BYTES`, so that the columns work in parallel.
        """
        waiting: dict[torch.dtype, dict[int, list[list[Layer]]]] = {}
        for layer in layers:
            buckets = waiting.setdefault(layer.dtype, {}).setdefault(self._grid.column_of(layer.owner), [[]])
            if buckets[-1] and sum(x.nbytes for x in [*buckets[-1], layer]) > BUCKET_BYTES:
                buckets.append([])
            buckets[-1].append(layer)
        for columns in waiting.values():
            for together in zip_longest(*columns.values(), fillvalue=()):
                yield [layer for bucket in together for layer in bucket]

    def whole_gradients(
        self, layers: Sequence[Layer], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[Layer, Tensor | None]]:
        """Each layer's gradient, (fan_out, fan_in), in the dtype of its statistics; None where it is not held.

        A collective if weights are sharded: every rank has to exhaust the iterator.

        Args:
            layers: the layers, the same ones in the same order on every rank.
            weights: the weights by name; all have gradients.
        """
        parts = {}
        for layer in layers:
            weight = weights[layer.name]
            assert weight.grad is not None
            if is_sharded(weight):
                own = local(weight.grad, layer.adapter.window).to(layer.dtype)
                parts[layer.name] = Part(own, weight, layer.owner, layer.adapter.window)
            else:
                yield layer, layer.adapter.matrix(weight.grad).to(layer.dtype) if layer.held else None
        for together in self.rounds(layer for layer in layers if layer.name in parts):
            gathered = self.gather_to_holders([parts[layer.name] for layer in together])
            for layer, whole in zip(together, gathered, strict=True):
                yield layer, layer.adapter.as_matrix(whole) if whole is not None else None

    def gather_to_holders(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """The whole tensors, on ranks that hold their layer; None on others. All parts have one dtype."""
        return self._communicator.gather_to_holders(parts)

    def scatter_from_holders(self, wholes: Sequence[Tensor | None], parts: Sequence[Part]) -> list[Tensor]:
        """This rank's parts of whole tensors. Only the ranks that hold the layer pass these. All have one dtype."""
        return self._communicator.scatter_from_holders(wholes, parts)

    def send_updates(self, updates: Iterable[tuple[Layer, Tensor]]) -> None:
        """Overwrite each layer's update, (fan_out, fan_in), with the update of the ranks that hold the layer."""
        self._communicator.send_from_holders([Parcel(update, layer.owner) for layer, update in updates])

    def on_any_rank(self, flags: Mapping[str, bool]) -> dict[str, bool]:
        """For each flag, whether it is set on any rank. Every rank has to pass the same names."""
        raised = torch.tensor(list(flags.values()), dtype=torch.int64)
        if flags and self._grid.ranks > 1:
            raised = raised.to(self._layers[0].device)
            sum_over_ranks([raised])
        return dict(zip(flags, raised.bool().tolist(), strict=True))

    def from_all(self, known: Mapping[str, T]) -> dict[str, T]:
        """Values by layer name, in the order of the layers, collected from all ranks.

        A collective of small objects if layers are spread over ranks.

        Args:
            known: what this rank knows, of the layers that it holds.
        """
        parts = gather_objects(dict(known)) if self.is_spread else [known]
        found = {name: value for part in parts for name, value in part.items()}
        return {layer.name: found[layer.name] for layer in self._layers if layer.name in found}

    def complete_states(self) -> dict[str, State]:
        """The tensors of every layer. If layers are spread, this is a collective and the result is in host memory."""
        if not self.is_spread:
            return {layer.name: dict(layer.state) for layer in self._layers}
        described = self.from_all(
            {
                layer.name: {name: _laid_out_as(tensor) for name, tensor in layer.state.items()}
                for layer in self._layers
                if layer.owned
            }
        )
        states = {}
        for layer in self._layers:
            state = layer.state
            if not layer.owned:
                state = {
                    name: torch.empty_strided(shape, strides, dtype=dtype, device=layer.device)
                    for name, (shape, strides, dtype) in described[layer.name].items()
                }
            # One layer at a time: the device never has to hold them all.
            send_from_owners([Parcel(tensor, layer.owner) for tensor in state.values()])
            states[layer.name] = {name: tensor.cpu() for name, tensor in state.items()}
        return states


def _laid_out_as(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Shape, strides and dtype of a copy.

    The memory layout matters: products of transposed layouts round differently, and a resumed run has to repeat the
    interrupted one bit for bit.
    """
    copy = torch.empty_like(tensor, device="meta")
    return tuple(copy.shape), copy.stride(), copy.dtype
