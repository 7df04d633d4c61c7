"""Rounded products: exactly those of rounded inputs, only inside the context, and close enough to train with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hf_so2
from hf_so2.linalg import matmul_precision

METHODS = ("kfac", "ekfac", "tekfac", "foof", "shampoo", "soap", "kl_shampoo")


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in "ab")
    return left.to(dtype), right.to(dtype)


def distance(product: Tensor, exact: Tensor) -> float:
    return float((product.double() - exact).abs().max() / exact.abs().max())


def test_medium_is_the_product_of_rounded_inputs_or_changes_nothing() -> None:
    left, right = operands(torch.float32)
    with matmul_precision("medium"):
        product = left @ right
    exact = left.double() @ right.double()
    rounded = left.bfloat16().double() @ right.bfloat16().double()
    assert distance(rounded, exact) > 1e-4
    assert product.dtype == torch.float32
    # A CPU without such instructions multiplies in full.
    assert min(distance(product, rounded), distance(product, exact)) < 1e-6


def test_float64_is_left_alone_and_so_is_everything_outside() -> None:
    left, right = operands(torch.float64)
    before, exact = left.float() @ right.float(), left @ right
    with matmul_precision("medium"):
        assert torch.equal(left @ right, exact)
    with pytest.raises(ZeroDivisionError), matmul_precision("medium"):
        raise ZeroDivisionError
    assert torch.equal(left.float() @ right.float(), before)
    assert torch.get_float32_matmul_precision() == "highest"


def test_highest_keeps_what_the_user_has_set() -> None:
    left, right = operands(torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        expected = left @ right
        with matmul_precision("highest"):
            assert torch.equal(left @ right, expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("method", METHODS)
def test_updates_point_the_same_way(method: str) -> None:
    def trained(precision: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 8, bias=False))
        optimizer = hf_so2.build_optimizer(method, model, lr=0.01, curvature_matmul_precision=precision)
        start = model[0].weight.detach().clone()
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(512, 64)).square().mean().backward()
            optimizer.step()
        return model[0].weight.detach() - start

    exact, rounded = trained("highest"), trained("medium")
    # Whitening magnifies the rounding in the directions of small gradients.
    assert float(nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) > 0.98
