"""bf16 and fp16: parameters, autocast and loss scaling beside statistics in float32, and gradients near underflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from shared.helpers import captured_factors, relative_error
from torch import Tensor, nn

import hf_so2

METHODS = ["kfac", "foof", "ekfac", "tkfac", "tekfac"]
LOW = [torch.bfloat16, torch.float16]
ROWS = 40


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Weights that bfloat16 holds exactly, so that a model in low precision starts at the same point."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return model.to(torch.bfloat16).to(dtype)


def loss(model: nn.Module, seed: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return (model(inputs.to(dtype)).float() - 1).square().mean()


def cosine(first: Tensor, second: Tensor) -> float:
    return float(nn.functional.cosine_similarity(first.flatten().float(), second.flatten().float(), dim=0))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_parameters_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """Statistics are float32; the first step points where float32's does, up to the rounding of its gradients."""
    changes = []
    for kind in (torch.float32, dtype):
        model = mlp(kind)
        optimizer = hf_so2.build_optimizer(name, model, lr=0.05, damping=1e-2)
        before = model[0].weight.detach().clone()
        loss(model, 0).backward()
        optimizer.step()
        changes.append(model[0].weight.detach() - before)
        for step in range(1, 6):
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()
        for layer in optimizer.curvature.layers.values():
            assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in layer.state.values())
        assert all(p.dtype == kind and torch.isfinite(p).all() for p in model.parameters())
    assert cosine(*changes) > 0.99


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Parameters and statistics stay in float32, and the factors are those of float32 within 2 %."""
    factors = []
    for enabled in (False, True):
        model = mlp()
        optimizer = hf_so2.build_optimizer(name, model)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = loss(model, 0)
        value.backward()
        optimizer.step()
        factors.append(
            {
                (layer.name, key): layer.state[key] / layer.state["weight"]
                for layer in optimizer.curvature.layers.values()
                for key in layer.block.statistics
                if key != "S"  # of the first step's seed, which a basis of another split would change
            }
        )
        assert all(value.dtype == torch.float32 for value in factors[-1].values())
    for key, expected in factors[0].items():
        assert relative_error(factors[1][key], expected) < 2e-2, key


def test_loss_scaler_leaves_the_factors_alone() -> None:
    """The scale is announced and undone; a step that the scaler skips leaves nothing behind once it is discarded."""
    plain, scaled = mlp(torch.float64), mlp(torch.float64)
    optimizers = [hf_so2.build_optimizer("kfac", model, lr=0.05) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizers[0].zero_grad()
        loss(plain, step).backward()
        optimizers[0].step()
        for overflows in (step == 1, False):
            optimizers[1].zero_grad()
            optimizers[1].announce(ROWS, scaler.get_scale() / ROWS)
            scaler.scale(loss(scaled, step)).backward()
            if overflows:
                scaled[0].weight.grad.fill_(float("inf"))
            scaler.step(optimizers[1])
            scaler.update()
            optimizers[1].discard_captures()
            if not overflows:
                break
    assert optimizers[1].steps == 3
    expected = captured_factors(optimizers[0])
    for name, factors in captured_factors(optimizers[1]).items():
        assert all(relative_error(value, expected[name][key]) < 1e-6 for key, value in factors.items())
    for first, second in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
@pytest.mark.parametrize("name", METHODS)
def test_vanishing_gradients_fail_no_refresh(name: str, rule: str) -> None:
    """Their squares leave float32 between 1e-18 and 1e-23, where training that has settled may well end up."""
    for power in (-16, -17, -18, -19, -20, -21, -22, -23, -25):
        torch.manual_seed(0)
        model = nn.Linear(12, 10, bias=False)
        optimizer = hf_so2.build_optimizer(name, model, damping_rule=rule, norm_control="none", damping=1e-5)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.randn(64, 12)).square().sum() / 64 * 10.0**power).backward()
            optimizer.step()
        assert optimizer.curvature.failed_refreshes == optimizer.curvature.dropped_statistics == 0
        assert torch.isfinite(model.weight).all()


def test_a_vanishing_side_is_the_identity_and_the_other_side_is_not() -> None:
    """`B` of gradients near 1e-20 holds no digits, `A` does: K-FAC's step is FOOF's there."""
    generator = torch.Generator().manual_seed(0)
    inputs, costs = (torch.randn(64, size, generator=generator) for size in (12, 10))
    model = nn.Linear(12, 10, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    settings: dict[str, Any] = {"norm_control": "none", "momentum": 0.0, "damping": 1e-5}
    optimizer = hf_so2.build_optimizer("kfac", model, lr=1.0, **settings)
    ((model(inputs) * costs).sum() / 64 * 1e-20).backward()
    optimizer.step()
    h, delta = inputs.double().numpy(), costs.double().numpy() * 1e-20
    a = h.T @ h / 64
    expected = -(delta.T @ h / 64) @ np.linalg.inv(a + 1e-5 * np.trace(a) * np.eye(12))
    assert relative_error(model.weight, torch.from_numpy(expected)) < 1e-4
