"""A small float64 model, its batches, and what something odd in its loop changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shared.helpers import captured_factors
from torch import Tensor, nn

import hf_so2

Odd = Callable[[int, nn.Module, hf_so2.SecondOrderOptimizer], object]
NAMES = ["kfac", "ekfac", "tkfac", "tekfac", "foof"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(seed: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = size * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (12,), generator=generator)


def loss_of(model: nn.Module, seed: int, size: float = 1.0) -> Tensor:
    inputs, targets = batch(seed, size)
    return nn.functional.cross_entropy(model(inputs), targets)


def differences(name: str, before: Odd, after: Odd = lambda *_: None, **settings: Any) -> tuple[float, float]:
    """Relative change of the update of four steps, and of the factors, by what is done around every backward pass."""
    runs = []
    for odd in (False, True):
        model = net()
        start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        optimizer = hf_so2.build_optimizer(name, model, **settings)
        for step in range(4):
            if odd:
                before(step, model, optimizer)
            loss_of(model, step).backward()
            if odd:
                after(step, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start
        factors = [x.reshape(-1) for layer in captured_factors(optimizer).values() for x in layer.values()]
        runs.append((moved, torch.cat(factors)))
    (moved, factors), (odd_moved, odd_factors) = runs
    return float((odd_moved - moved).norm() / moved.norm()), float((odd_factors - factors).norm() / factors.norm())
