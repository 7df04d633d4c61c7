"""SOAP's momentum, kept in its bases: the same updates as of an average in the weight's own axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import hf_so2
from hf_so2.methods import blocks as methods
from hf_so2.optim.optimizer import SecondOrderOptimizer

LAYER = "0.weight"


def soap(shape: tuple[int, int], dtype: torch.dtype = torch.float64, **settings: Any) -> SecondOrderOptimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
    return hf_so2.build_optimizer("soap", model, lr=0.01, **{"norm_control": "none", **settings})


def trained(optimizer: SecondOrderOptimizer, steps: int, seed: int = 1) -> torch.Tensor:
    (weight,) = optimizer.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("shape", [(5, 5), (4, 7)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": True},
        {"factor_update_steps": 2, "preconditioner_update_steps": 3},
        {"preconditioner_update_steps": 1, "norm_control": "spectral"},
        {"max_preconditioner_dim": 6},
    ],
    ids=str,
)
def test_updates_are_those_of_an_average_in_the_weights_axes(
    shape: tuple[int, int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = soap(shape, **settings)
    controls = {name: replace(control, needs="moment") for name, control in methods.NORM_CONTROLS.items()}
    monkeypatch.setattr(methods, "NORM_CONTROLS", controls)
    plain = soap(shape, **settings)
    assert "M" in kept.curvature.layers[LAYER].state
    assert "M" not in plain.curvature.layers[LAYER].state
    start = soap(shape).param_groups[0]["params"][0].detach()
    actual, expected = trained(kept, 15) - start, trained(plain, 15) - start
    assert torch.linalg.norm(actual - expected) < 1e-9 * torch.linalg.norm(expected)


@pytest.mark.parametrize("settings", [{}, {"factor_update_steps": 5}])
def test_one_rotation_of_the_gradient_serves_statistics_and_momentum(settings: dict[str, Any]) -> None:
    """Off refreshes; the average is what a dense calculation makes of the gradients."""
    optimizer = soap((4, 6), **settings)
    trained(optimizer, 10)
    layer = optimizer.curvature.layers[LAYER]
    before = {name: value.clone() for name, value in layer.state.items()}
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.randn(4, 6, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(layer.state["L_basis"], before["L_basis"])
    expected = 0.9 * before["M"] + 0.1 * before["L_basis"].T @ weight.grad @ before["R_basis"]
    torch.testing.assert_close(layer.state["M"], expected, rtol=1e-12, atol=1e-12)
    assert layer.rotated is None


def test_a_huge_gradient_does_not_stay_in_the_average() -> None:
    optimizer = soap((4, 6), torch.float32)
    trained(optimizer, 8)
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.full_like(weight, 3e38)
    optimizer.step()
    assert torch.isfinite(optimizer.curvature.layers[LAYER].state["M"]).all()
    before = trained(optimizer, 1)
    after = trained(optimizer, 1)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "settings", [{"norm_control": "kl_clip"}, {"momentum_order": "after"}, {"block_size": 3}], ids=str
)
def test_who_looks_at_the_average_finds_it_where_it_was(settings: dict[str, Any]) -> None:
    """Nothing is kept twice."""
    optimizer = soap((4, 6), **settings)
    trained(optimizer, 3)
    (weight,) = optimizer.param_groups[0]["params"]
    layer = optimizer.curvature.layers[LAYER]
    assert not any(name.endswith("M") for name in layer.state)
    assert ("momentum_buffer" in optimizer.state[weight]) != ("momentum_buffer" in layer.state)


def test_a_kept_momentum_takes_the_place_of_the_other() -> None:
    optimizer = soap((4, 6))
    trained(optimizer, 3)
    (weight,) = optimizer.param_groups[0]["params"]
    assert not optimizer.state[weight]
