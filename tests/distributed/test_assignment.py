"""Placement of work on ranks, without processes."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from hf_so2.distributed import assign

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
