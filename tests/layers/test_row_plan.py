"""Statistics of as many rows as a factor needs: which rows these are, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.dense_fisher import METHODS, after_still_steps, relative
from shared.helpers import captured_factors
from torch import Tensor, nn

import hf_so2
from hf_so2.layers.plan import LEAST_ROWS, ROWS_PER_DIMENSION, SAMPLED_ROWS, RowPlan, thinning

SEQUENCES, LENGTH = 2 * LEAST_ROWS // 16, 32  # four times the least


@given(rows=st.integers(0, 10**7), dimension=st.integers(0, 10**5))
def test_rows_are_thinned_as_far_as_enough_are_left(rows: int, dimension: int) -> None:
    factor, least = thinning(rows, dimension), max(LEAST_ROWS, ROWS_PER_DIMENSION * dimension)
    assert factor == 1 or 0.75 * least <= rows / factor <= 1.5 * least
    assert factor > 1 or rows <= 1.5 * least


def plan(length: int, stride: int, step: int = 0, seed: int = 0, sequences: int = 40) -> RowPlan:
    inputs = torch.randn(sequences * length, 9, generator=torch.Generator().manual_seed(seed)) + 5
    live = torch.rand(len(inputs), generator=torch.Generator().manual_seed(seed)) < 0.8
    shape = torch.Size((sequences, length))
    return RowPlan(live, inputs=inputs, shape=shape, seen=stride * SAMPLED_ROWS, step=step)


@given(length=st.integers(1, 40), stride=st.integers(1, 50), first=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_every_row_has_its_turn(length: int, stride: int, first: int, seed: int) -> None:
    """A sample is one in so many rows of each sequence, and in as many steps each row is taken once."""
    every = min(stride, length)
    times = torch.zeros(40 * length)
    for step in range(first, first + every):
        sample = plan(length, stride, step, seed).sample()
        if every == 1:
            assert sample is None
            return
        assert sample is not None
        indices, stands_for = sample
        assert stands_for == every
        counts = torch.bincount(indices // length, minlength=40)
        assert counts.min() >= length // every
        assert counts.max() <= -(-length // every)
        times[indices] += 1
    assert torch.equal(times, torch.ones_like(times))


def test_sequences_begin_at_different_places() -> None:
    """Also where all have the same mean. Where one row of each counts, such rows are thus not left out together."""
    whole = plan(32, 8)
    sample = whole.sample()
    assert sample is not None
    begins = torch.bincount(sample[0].reshape(40, -1)[:, 0] % 32, minlength=8)
    assert begins.max() <= 15
    first_alone = torch.arange(40 * 32) % 32 == 0
    sample = replace(whole, live=first_alone).sample()
    assert sample is not None
    assert 1 <= first_alone[sample[0]].sum() <= 15


def batch(sequences: int = SEQUENCES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(sequences, LENGTH, 7, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 5, (sequences, LENGTH), generator=generator)


def optimizer_after(
    steps: int, optim: str = "kfac", parts: Sequence[Any] = (slice(None),), resume: Any = None, **settings: Any
) -> hf_so2.SecondOrderOptimizer:
    return after_still_steps(optim, batch(), steps, parts, resume, **settings)


def states(optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, Tensor]:
    assert optimizer.curvature is not None
    return {f"{name}/{key}": x for name, layer in optimizer.curvature.layers.items() for key, x in layer.state.items()}


@pytest.mark.parametrize("optim", METHODS)
def test_the_first_step_takes_all_rows_and_the_next_ones_a_part(optim: str) -> None:
    every: dict[str, Any] = {"factor_token_sketch": 1}
    fixed: dict[str, Any] = {"factor_token_sketch": thinning(SEQUENCES * LENGTH)}
    if optim in ("ekfac", "tekfac"):
        every["moment_token_stride"] = 1
    first, all_rows = states(optimizer_after(1, optim)), states(optimizer_after(1, optim, **every))
    assert all(torch.equal(first[key], all_rows[key]) for key in all_rows)

    start = optimizer_after(1, optim).state_dict()
    second, folded = (
        states(optimizer_after(1, optim, resume=start, **more)) for more in ({}, {**every, **fixed})
    )  # fmt: skip
    assert fixed["factor_token_sketch"] > 1
    for key in (key for key in folded if key.endswith(("/A", "/B", "/tau"))):
        assert torch.equal(second[key], folded[key])
        assert key.endswith("/tau") or relative(second[key], states(optimizer_after(2, optim, **every))[key]) > 1e-3


@pytest.mark.parametrize("optim", METHODS)
@pytest.mark.parametrize("parts", [(slice(0, 5), slice(5, None)), (list(reversed(range(SEQUENCES))),)])
def test_neither_the_split_of_a_batch_nor_its_order_matters(parts: Any, optim: str) -> None:
    whole, other = states(optimizer_after(3, optim)), states(optimizer_after(3, optim, parts=parts))
    for name in whole:
        if name.endswith(("/A", "/B", "/S", "/tau")):
            assert relative(other[name], whole[name]) < 1e-10
    if optim == "ekfac":
        of_all = states(optimizer_after(3, optim, moment_token_stride=1))
        assert relative(whole["0.weight/S"], of_all["0.weight/S"]) > 1e-3


@pytest.mark.parametrize("optim", ["kfac", "tekfac"])
def test_a_resumed_run_takes_the_same_rows(optim: str) -> None:
    start = optimizer_after(2, optim).state_dict()
    resumed, whole = states(optimizer_after(1, optim, resume=start)), states(optimizer_after(3, optim))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    # A state of an earlier version does not know how many rows there were: its next step takes them all.
    for entry in start["curvature"]["curvature"]["layers"].values():
        del entry["rows"]
    optimizer = optimizer_after(0, optim, resume=start)
    assert optimizer.curvature is not None
    assert {layer.rows for layer in optimizer.curvature.layers.values()} == {0}


@pytest.mark.parametrize("sketch", [1, None])
@pytest.mark.parametrize("garbage", [1e3, 1e200, float("inf"), float("nan")])
def test_rows_that_do_not_count_may_hold_anything(sketch: int | None, garbage: float) -> None:
    factors = []
    for content in (0.0, garbage):
        model = nn.Sequential(nn.Linear(7, 6, bias=False), nn.Linear(6, 5)).double()
        for index, weight in enumerate(model.parameters()):
            weight.data = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).cos().reshape(weight.shape) + index
        inputs, targets = batch()
        inputs[:, -3:] = content
        optimizer = hf_so2.build_optimizer(
            "kfac", model, lr=1e-30, fallback_learning_rate=1e-30, factor_token_sketch=sketch
        )
        for _ in range(2):
            outputs = model(inputs)[:, :-3].reshape(-1, 5)
            nn.functional.cross_entropy(outputs, targets[:, :-3].reshape(-1)).backward()
            # 0 times such a number is no gradient: the weight's own would not be finite.
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        factors.append(captured_factors(optimizer))
    for name in factors[0]:
        for side in "AB":
            assert relative(factors[1][name][side], factors[0][name][side]) < 1e-12
