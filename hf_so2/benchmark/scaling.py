"""What a rank computes, keeps and sends, from the shapes of a model alone: the cost model of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

from hf_so2.curvature import CurvatureBlock
from hf_so2.distributed import Cost, Grid, place
from hf_so2.methods.table import METHODS, Site
from hf_so2.optim.build import UNSCALED
from hf_so2.weights import costs

BYTES = 4  # statistics are float32


@dataclass(frozen=True)
class Llama:
    """The hidden weights of a Llama.

    Args:
        name: its size.
        width: hidden size.
        layers: how many.
        mlp: intermediate size.
        keys: width of keys and of values, smaller than `width` with grouped heads.
    """

    name: str
    width: int
    layers: int
    mlp: int
    keys: int

    def weights(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and (fan_out, fan_in) of each."""
        d, m, k = self.width, self.mlp, self.keys
        shapes = {"q": (d, d), "k": (k, d), "v": (k, d), "o": (d, d), "gate": (m, d), "up": (m, d), "down": (d, m)}
        for layer in range(self.layers):
            for name, shape in shapes.items():
                yield f"{layer}.{name}", shape


MODELS = (
    Llama("100M", 768, 12, 2048, 768),
    Llama("1B", 2048, 16, 8192, 512),
    Llama("8B", 4096, 32, 14336, 1024),
    Llama("70B", 8192, 80, 28672, 1024),
)
KINDS = ("kfac", "foof", "ekfac", "shampoo", "soap", "kl_shampoo", "muon")


@dataclass(frozen=True)
class Load:
    """Of the rank with most of each, per step; work that is not done at every step is spread over the steps.

    Attributes:
        state_bytes: statistics and preconditioners that it keeps; momentum, norm control and AdamW's state aside.
        refresh_flops: of the preconditioners that it refreshes.
        held_flops: of preconditioning, and of statistics that are taken from gradients.
        capture_flops: of statistics that are taken from its own tokens.
        sent_bytes: what it gives to collectives; an all-reduce moves about twice as much over the wire.
    """

    state_bytes: float = 0
    refresh_flops: float = 0
    held_flops: float = 0
    capture_flops: float = 0
    sent_bytes: float = 0


@dataclass(frozen=True)
class _Weight:
    """What one weight costs; see the functions of `hf_so2.weights.costs`."""

    size: int
    state: int
    everywhere: int
    sums: int
    results: int
    refresh: float
    held: float
    capture: float

    @classmethod
    def of(cls, block: CurvatureBlock, shape: tuple[int, int], tokens: int) -> _Weight:
        of_gradients = block.statistics_flops(shape, 0)
        return cls(
            size=shape[0] * shape[1],
            state=costs.state_numbers(block, shape),
            everywhere=costs.observed_numbers(block, shape),
            sums=costs.statistics_sent(block, shape),
            results=costs.preconditioner_sent(block, shape),
            refresh=block.refresh_flops(shape),
            held=costs.held_flops(block, shape),
            capture=block.statistics_flops(shape, tokens) - of_gradients,
        )


def preconditioned(kind: str, model: Llama, tokens: int) -> dict[str, _Weight]:
    """The weights that an optimizer preconditions with its default settings, by name."""
    method = METHODS[kind]
    settings = method.settings({})
    by_shape: dict[tuple[int, int], _Weight | None] = {}
    for _, shape in model.weights():
        if shape not in by_shape:
            block = method.block_for(settings, Site(shape, UNSCALED))
            assert block is not None
            # One dimension that is too large leaves the Shampoo family the other side, and the K-FAC family nothing.
            too_large = sum(dim > settings.max_preconditioner_dim for dim in shape)
            fits = too_large < (2 if "gradients" in method.uses else 1)
            by_shape[shape] = _Weight.of(block, shape, tokens) if fits else None
    return {name: weight for name, shape in model.weights() if (weight := by_shape[shape]) is not None}


@cache
def load(kind: str, model: Llama, ranks: int, fraction: float, tokens: int = 4096) -> Load:
    """What each rank has to do, keep and send; of every quantity, that of the rank with most.

    Args:
        kind: a method with curvature.
        model: whose hidden weights are preconditioned.
        ranks: how many.
        fraction: `gradient_worker_fraction`.
        tokens: that a rank sees in a step.
    """
    weights = preconditioned(kind, model, tokens)
    settings = METHODS[kind].settings({})
    every, between = settings.preconditioner_update_steps, settings.factor_update_steps
    grid = Grid.of_fraction(fraction, ranks)
    owners = place({name: Cost(w.refresh / every, w.held) for name, w in weights.items()}, grid)
    owned: dict[int, list[_Weight]] = {rank: [] for rank in range(ranks)}
    columns: dict[int, list[_Weight]] = {column: [] for column in range(grid.columns)}
    for name, owner in owners.items():
        owned[owner].append(weights[name])
        columns[grid.column_of(owner)].append(weights[name])
    return Load(
        state_bytes=BYTES * max(_kept(column, weights.values(), grid) for column in columns.values()),
        refresh_flops=max(sum(w.refresh for w in rank) for rank in owned.values()) / every,
        held_flops=max(sum(w.held for w in column) for column in columns.values()),
        capture_flops=sum(w.capture for w in weights.values()) / between,
        sent_bytes=BYTES * max(_sent(column, weights.values(), grid, every, between) for column in columns.values()),
    )


def _kept(held: Collection[_Weight], weights: Collection[_Weight], grid: Grid) -> int:
    """Numbers in the state of a rank that holds some of the weights."""
    if grid.columns == 1:
        return sum(w.state for w in weights)
    return sum(w.everywhere for w in weights) + sum(w.state - w.everywhere for w in held)


def _sent(held: Collection[_Weight], weights: Collection[_Weight], grid: Grid, every: int, between: int) -> float:
    """Numbers that such a rank gives to collectives per step.

    Args:
        every: steps between refreshes.
        between: steps between updates of the statistics.
    """
    sent = 0.0
    if grid.columns > 1:
        sent += sum(w.sums / between + w.size + w.everywhere / every for w in weights)
    if grid.workers > 1:
        sent += sum(w.sums / between + (w.results - (w.everywhere if grid.columns > 1 else 0)) / every for w in held)
    return sent
