"""Refreshes take turns: no step does much more than its share, every layer keeps its interval, nothing else moves."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.helpers import llama
from torch import nn

import hf_so2
from hf_so2.distributed import assign
from hf_so2.weights.layer import Layer
from hf_so2.weights.schedule import EARLY_STEPS, GROWTH, refresh_due, turns

COSTS = st.dictionaries(st.text("abc.0123", min_size=1, max_size=6), st.floats(0, 1e18), max_size=40)


@given(costs=COSTS, every=st.integers(1, 30))
def test_no_turn_has_more_than_its_share_and_one_job(costs: dict[str, float], every: int) -> None:
    found = turns(costs, every)
    assert list(found) == list(costs)
    assert set(found.values()) <= set(range(every))
    work: Counter[int] = Counter()
    for name, turn in found.items():
        work[turn] += costs[name]
    bound = sum(costs.values()) / every + max(costs.values(), default=0)
    assert max(work.values(), default=0) <= bound * (1 + 1e-9)


@given(costs=COSTS, every=st.integers(1, 30), data=st.data())
def test_turns_do_not_depend_on_the_order_or_the_unit(costs: dict[str, float], every: int, data: st.DataObject) -> None:
    shuffled = {name: costs[name] * 4 for name in data.draw(st.permutations(list(costs)))}
    assert turns(shuffled, every) == turns(costs, every)


@given(every=st.integers(1, 60), data=st.data())
def test_refreshes_grow_apart_until_the_interval_is_reached(every: int, data: st.DataObject) -> None:
    turn = data.draw(st.integers(0, every - 1))
    steps = [step for step in range(1, 10 * every + 20) if refresh_due(step, every, turn)]
    assert set(steps) >= EARLY_STEPS
    gaps = [(before, after - before) for before, after in itertools.pairwise(steps) if before >= max(EARLY_STEPS)]
    for before, gap in gaps:
        assert gap <= min(every, (GROWTH - 1) * before + 1)
    # None comes much earlier than that, but for the first, which the turns spread.
    for before, gap in gaps[1:]:
        assert gap >= 0.9 * min(every, (GROWTH - 1) * before) - 1
    regular = math.ceil(every / math.log(GROWTH)) + 1  # one that fell between two steps comes at the later one
    assert [step for step in steps if step >= max(regular, 8)] == [
        step for step in range(max(regular, 8), 10 * every + 20) if step % every == turn
    ]


@pytest.mark.parametrize("every", [10, 20, 50])
def test_turns_spread_early_refreshes_too(every: int) -> None:
    for step in range(8, 3 * every):
        due = sum(refresh_due(step, every, turn) for turn in range(every))
        # A refresh every (1 - 1 / GROWTH) steps of the steps so far, rounded up to whole turns.
        assert due <= every * max(1 / every, math.log(GROWTH) ** -1 / (step - 1)) + 1


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_what_is_due_at_a_step_is_spread_over_ranks(ranks: int) -> None:
    """Dealt out independently, the layers of one turn would belong to a few of the ranks."""
    costs = {f"{i}.{name}": cost for i in range(32) for name, cost in (("up", 64.0), ("down", 64.0), ("q", 1.0))}
    owners, found = assign(costs, ranks), turns(costs, 10)
    for turn in range(10):
        loads = [sum(c for n, c in costs.items() if found[n] == turn and owners[n] == rank) for rank in range(ranks)]
        assert max(loads) <= sum(loads) / ranks + 64.0


def recorded(optimizer: hf_so2.SecondOrderOptimizer) -> list[str]:
    """The names of the layers that are refreshed from now on."""
    names: list[str] = []
    curvature = optimizer.curvature
    assert curvature is not None
    inner = curvature._refresh

    def counting(layers: Sequence[Layer]) -> dict[str, str | None]:
        names.extend(layer.name for layer in layers)
        return inner(layers)

    curvature._refresh = counting  # type: ignore[method-assign]
    return names


def test_a_model_refreshes_at_once_early_and_in_turns_later() -> None:
    optimizer = hf_so2.build_optimizer("kfac", model := llama(), preconditioner_update_steps=5)
    names, tokens = recorded(optimizer), torch.arange(16).view(2, 8)
    assert optimizer.curvature is not None
    layers = optimizer.curvature.layers
    by_step = {}
    for step in range(1, 24):
        names.clear()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        by_step[step] = list(names)
    for step in EARLY_STEPS:
        assert by_step[step] == list(layers)
    work = {name: layer.block.refresh_flops(layer.shape) for name, layer in layers.items()}
    for steps in (range(14, 19), range(19, 24)):
        assert sorted(name for step in steps for name in by_step[step]) == sorted(layers)
        for step in steps:
            assert by_step[step] == by_step[step - 5] or step < 19
            assert sum(work[name] for name in by_step[step]) <= sum(work.values()) / 5 + max(work.values())


def test_a_layer_that_is_first_used_late_is_refreshed_at_once_and_takes_turns_from_then_on() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=1, preconditioner_update_steps=10)
    names = recorded(optimizer)
    assert optimizer.curvature is not None
    steps = []
    for step in range(1, 40):
        names.clear()
        optimizer.zero_grad()
        for used in model if step >= 13 else model[:1]:
            used(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        if "1.weight" in names:
            steps.append(step)
    assert steps == [13, 17, 25, 35]
    assert turns({"0.weight": 1.0, "1.weight": 1.0}, 10)["1.weight"] == 5
