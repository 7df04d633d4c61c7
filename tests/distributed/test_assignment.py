"""Placement of work on ranks, without processes."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.distributed import Cost, Grid, assign, place

costs = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 1000), min_size=1, max_size=7)


def heaviest(costs: dict[str, int], owners: dict[str, int], ranks: int) -> int:
    return max(sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(ranks))


@given(costs=costs, ranks=st.integers(1, 4))
def test_every_job_has_one_rank_and_the_heaviest_is_within_grahams_bound(costs: dict[str, int], ranks: int) -> None:
    owners = assign(costs, ranks)
    assert list(owners) == list(costs)
    assert set(owners.values()) <= set(range(ranks))
    placements = itertools.product(range(ranks), repeat=len(costs))
    best = min(heaviest(costs, dict(zip(costs, placement, strict=True)), ranks) for placement in placements)
    assert heaviest(costs, owners, ranks) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@given(costs=costs, ranks=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_order_of_the_jobs_does_not_matter(costs: dict[str, int], ranks: int, seed: int) -> None:
    names = list(costs)
    random.Random(seed).shuffle(names)
    assert assign({name: costs[name] for name in names}, ranks) == assign(costs, ranks)


def test_a_transformers_layers_spread_evenly() -> None:
    """Twelve layers' worth of factors over 4 ranks: nobody carries more than 5 % above the mean."""
    shapes = {
        "q": (256, 256),
        "k": (256, 256),
        "v": (256, 256),
        "o": (256, 256),
        "up": (1024, 256),
        "down": (256, 1024),
    }
    costs = {f"{layer}.{name}": sum(d**3 for d in shape) for layer in range(12) for name, shape in shapes.items()}
    assert heaviest(costs, assign(costs, 4), 4) <= 1.05 * sum(costs.values()) / 4


@given(ranks=st.integers(1, 64), fraction=st.fractions(0, 1, max_denominator=1000))
def test_a_grid_has_the_workers_asked_for_or_the_next_number_that_divides_the_ranks(
    ranks: int, fraction: Fraction
) -> None:
    grid = Grid.of_fraction(float(fraction), ranks)
    assert grid.workers == next(n for n in range(1, ranks + 1) if ranks % n == 0 and n >= fraction * ranks)
    assert grid.workers * grid.columns == ranks
    # Rows and columns are two partitions of the ranks, and meet in one rank each.
    rows, columns = [grid.row(i) for i in range(grid.workers)], [grid.column(i) for i in range(grid.columns)]
    assert sorted(itertools.chain(*rows)) == sorted(itertools.chain(*columns)) == list(range(ranks))
    assert all(len({*row} & {*column}) == 1 for row in rows for column in columns)
    assert all(rank in rows[grid.row_of(rank)] and rank in columns[grid.column_of(rank)] for rank in range(ranks))


@pytest.mark.parametrize(
    ("fraction", "ranks", "workers"),
    [
        (1, 8, 8),
        (0, 8, 1),
        (1 / 3, 3, 1),
        (0.33, 3, 1),
        (0.5, 8, 4),
        (0.3, 8, 4),
        (0.5, 3, 3),
        (0.1, 10, 1),
        (0.7, 10, 10),
    ],
)
def test_gradient_workers(fraction: float, ranks: int, workers: int) -> None:
    assert Grid.of_fraction(fraction, ranks).workers == workers


shares = st.builds(Cost, st.integers(0, 1000).map(float), st.integers(0, 1000).map(float))


@given(costs=st.dictionaries(st.text(min_size=1, max_size=4), shares, min_size=1, max_size=6), ranks=st.integers(1, 4))
def test_where_each_rank_has_its_own_layers_refresh_and_preconditioning_are_balanced_together(
    costs: dict[str, Cost], ranks: int
) -> None:
    owners = place(costs, Grid(ranks, 1))
    assert owners == assign({name: cost.refresh + cost.held for name, cost in costs.items()}, ranks)


@given(
    costs=st.dictionaries(st.text(min_size=1, max_size=4), shares, min_size=1, max_size=7),
    workers=st.integers(1, 3),
    columns=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_layers_are_balanced_over_columns_and_their_refreshes_within(
    costs: dict[str, Cost], workers: int, columns: int, seed: int
) -> None:
    """Graham's bound at both levels; the order of the layers does not matter."""
    grid = Grid(workers * columns, workers)
    owners = place(costs, grid)
    assert list(owners) == list(costs)
    loads = [0.0] * columns
    for name, cost in costs.items():
        loads[grid.column_of(owners[name])] += cost.refresh / workers + cost.held
    mean = sum(loads) / columns
    largest = max(cost.refresh / workers + cost.held for cost in costs.values())
    assert max(loads) <= mean + (1 - 1 / columns) * largest + 1e-9
    for index in range(columns):
        refreshes = {r: sum(c.refresh for n, c in costs.items() if owners[n] == r) for r in grid.column(index)}
        mine = [c.refresh for n, c in costs.items() if owners[n] in refreshes]
        assert max(refreshes.values()) <= sum(mine) / workers + (1 - 1 / workers) * max(mine, default=0) + 1e-9
    names = list(costs)
    random.Random(seed).shuffle(names)
    assert place({name: costs[name] for name in names}, grid) == owners


def test_where_all_ranks_hold_everything_only_the_refreshes_are_spread() -> None:
    costs = {"a": Cost(4, 0), "b": Cost(3, 100), "c": Cost(2, 0), "d": Cost(1, 50)}
    assert place(costs, Grid(2, 2)) == {"a": 0, "b": 1, "c": 1, "d": 0}
