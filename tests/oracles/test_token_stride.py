"""`factor_token_stride`: the statistics of every k-th row stand for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature.dense_fisher import linear_layers, mlp_case, relative
from helpers import captured_factors, dense_factors, token_loss_sum
from torch import Tensor

import hf_so2

ROWS = 48


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 5, (ROWS,), generator=generator)


def factors_at(stride: int, parts: list[slice]) -> dict[str, dict[str, np.ndarray]]:
    model, _ = mlp_case()
    inputs, targets = batch()
    optimizer = hf_so2.build_optimizer("kfac", model, factor_token_stride=stride)
    for part in parts:
        (token_loss_sum(model(inputs[part]), targets[part]) / ROWS).backward()
    optimizer.step()
    return captured_factors(optimizer)


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_factors_are_means_over_the_rows_that_take_turns(stride: int) -> None:
    model, _ = mlp_case()
    dense = dense_factors(model, linear_layers(model), lambda out, data: token_loss_sum(out, data[1]), batch())
    picked = [group * stride + group % stride for group in range(ROWS // stride)]
    for name, factors in factors_at(stride, [slice(None)]).items():
        h, delta = dense[name].inputs.numpy()[picked], dense[name].deltas.numpy()[picked]
        assert relative(factors["A"], h.T @ h / len(picked)) < 1e-12
        assert relative(factors["B"], delta.T @ delta / len(picked)) < 1e-12


def test_batches_of_whole_turns_can_be_split() -> None:
    whole, split = factors_at(4, [slice(None)]), factors_at(4, [slice(0, 16), slice(16, ROWS)])
    for name in whole:
        for side in "AB":
            assert relative(split[name][side], whole[name][side]) < 1e-12


def test_a_batch_smaller_than_the_stride_is_taken_whole() -> None:
    few, all_rows = factors_at(ROWS + 1, [slice(None)]), factors_at(1, [slice(None)])
    for name in few:
        assert all(np.array_equal(few[name][side], all_rows[name][side]) for side in "AB")
