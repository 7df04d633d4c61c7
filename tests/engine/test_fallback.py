"""AdamW beside second-order updates is torch's fused kernel on a CPU, and torch's AdamW whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared.helpers import llama
from torch import Tensor, nn

import hf_so2

CONSTANTS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def pair(fallback: nn.Module) -> nn.Sequential:
    """One layer for K-FAC and one for its fallback."""
    return nn.Sequential(nn.Linear(6, 5, bias=False, dtype=torch.float64), fallback)


def step_of_kfac(model: nn.Sequential, gradient: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step in which the weight of the second layer has this gradient."""
    optimizer.zero_grad()
    model(torch.ones(3, 6, dtype=torch.float64)).sum().backward()
    model[1].weight.grad = gradient
    optimizer.step()


def optimizer_of(model: nn.Module) -> hf_so2.SecondOrderOptimizer:
    return hf_so2.build_optimizer(
        "kfac", model, fallback_learning_rate=0.01, hidden_fallback_learning_rate=0.01, weight_decay=0.1, lr=0.01,
        skip_modules=["^1$"], fallback_warmup_steps=1,
    )  # fmt: skip


def test_embeddings_and_head_beside_kfac_move_as_by_the_fused_kernel_of_torch() -> None:
    """Bit for bit, so that it is that kernel."""
    model = llama().train()
    optimizer = hf_so2.build_optimizer("kfac", model, fallback_learning_rate=0.01, lr=0.01, fallback_warmup_steps=1)
    chosen = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    weights = {name: weight for name, weight in model.named_parameters() if name in chosen}
    copies = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    reference = torch.optim.AdamW(copies.values(), lr=0.01, **{**CONSTANTS, "weight_decay": 0.0}, fused=True)
    tokens = torch.arange(24).view(3, 8)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            copies[name].grad = weight.grad.clone()
        optimizer.step()
        reference.step()
        assert all(torch.equal(weights[name], copies[name]) for name in chosen)
        for name in chosen:
            assert optimizer.state[weights[name]].keys() == reference.state[copies[name]].keys()


@pytest.mark.parametrize("transposed", ["nothing", "weight", "gradient"])
def test_layouts_that_the_fused_kernel_gets_wrong_are_kept_from_it(transposed: str) -> None:
    torch.manual_seed(0)
    model = pair(nn.Linear(5, 7, bias=False, dtype=torch.float64))
    if transposed == "weight":
        model[1].weight = nn.Parameter(torch.randn(5, 7, dtype=torch.float64).t())
    copy = nn.Parameter(model[1].weight.detach().clone(memory_format=torch.contiguous_format))
    reference = torch.optim.AdamW([copy], lr=0.01, **CONSTANTS)
    optimizer = optimizer_of(model)
    for _ in range(3):
        gradient = torch.randn(7, 5, dtype=torch.float64)
        # Whole tensors with the strides that a transposed one has.
        step_of_kfac(model, gradient.t().contiguous().t() if transposed == "gradient" else gradient, optimizer)
        copy.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(model[1].weight.detach(), copy.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_the_steps_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = pair(nn.Linear(5, 7, bias=False, dtype=torch.float64))
    model[1].register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype),))
    model[1].to(dtype)
    copy = nn.Parameter(model[1].weight.detach().clone())
    reference = torch.optim.AdamW([copy], lr=0.01, **CONSTANTS)
    optimizer = optimizer_of(model)
    for _ in range(3):
        gradient = torch.randn(7, 5).to(dtype)
        step_of_kfac(model, gradient, optimizer)
        copy.grad = gradient.clone()
        reference.step()
        assert torch.equal(model[1].weight, copy)


def warmed(model: nn.Module, **settings: Any) -> hf_so2.SecondOrderOptimizer:
    """K-FAC on the first layer; AdamW on the second, with a warm-up of 8 steps."""
    return hf_so2.build_optimizer(
        "kfac", model, lr=0.01, hidden_fallback_learning_rate=0.05, weight_decay=0.1, skip_modules=["^1$"],
        **{"fallback_warmup_steps": 8, **settings},
    )  # fmt: skip


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 5, dtype=torch.float64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, lambda t: min(1, t / 8)),
        # The product of both would be slower than either.
        (lambda t: min(1, (t + 1) / 16), lambda t: min(1, t / 16)),
        (lambda t: min(1, (t + 1) / 4), lambda t: min(1, t / 8)),
        (lambda t: 1 - t / 12, lambda t: min(t / 8, 1 - (t - 1) / 12)),
        # A schedule that goes beyond what it multiplies is on its own from the eighth step on.
        (lambda t: 1 + t, lambda t: t / 8 if t < 8 else t),
    ],
    ids=["no schedule", "longer", "shorter", "no warm-up", "above 1"],
)
def test_the_first_steps_of_adamw_are_limited(schedule: Any, expected: Any) -> None:
    """As torch's AdamW with the rates `0.05 expected(t)`, t counted from 1."""
    torch.manual_seed(0)
    model = pair(nn.Linear(5, 7, bias=False, dtype=torch.float64))
    copy = nn.Parameter(model[1].weight.detach().clone())
    reference = torch.optim.AdamW([copy], lr=0.05, **CONSTANTS)
    optimizer = warmed(model)
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step, gradient in enumerate(gradients(11), start=1):
        step_of_kfac(model, gradient, optimizer)
        if scheduler is not None:
            scheduler.step()
        reference.param_groups[0]["lr"] = 0.05 * expected(step)
        copy.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(model[1].weight.detach(), copy.detach(), rtol=1e-12, atol=1e-14)


def test_the_limit_counts_a_parameters_own_steps_and_goes_on_from_a_checkpoint() -> None:
    """A parameter with a gradient in every other step, saved after three of its own."""
    torch.manual_seed(0)
    model = pair(nn.Linear(5, 7, bias=False, dtype=torch.float64))
    copy = nn.Parameter(model[1].weight.detach().clone())
    reference = torch.optim.AdamW([copy], lr=0.05, **CONSTANTS)
    optimizer = warmed(model)
    for step, gradient in enumerate(gradients(9), start=1):
        optimizer.zero_grad()
        model[0](torch.ones(3, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
        step_of_kfac(model, gradient, optimizer)
        if step == 3:
            saved, optimizer = optimizer.state_dict(), warmed(model)
            optimizer.load_state_dict(saved)
        reference.param_groups[0]["lr"] = 0.05 * min(1, step / 8)
        copy.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(model[1].weight.detach(), copy.detach(), rtol=1e-12, atol=1e-14)


def test_no_limit_without_curvature() -> None:
    """AdamW as a method is torch's from its first step on."""
    model, copy = nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False)
    copy.load_state_dict(model.state_dict())
    optimizer, reference = hf_so2.build_optimizer("adamw", model), torch.optim.AdamW(copy.parameters(), weight_decay=0)
    for layer, chosen in ((model, optimizer), (copy, reference)):
        layer(torch.ones(3, 5)).square().sum().backward()
        chosen.step()
    assert torch.equal(model.weight, copy.weight)
