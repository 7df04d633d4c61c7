"""How large a step is: KL clip and spectral norm against closed forms, and the momentum convention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.helpers import dense_factors, kronecker_solve, llama, relative_error, token_loss_sum
from torch import Tensor, nn

import hf_so2

RHO = 0.05
CONSTANT = {"damping_rule": "constant", "damping": RHO, "momentum": 0.0}


def mlp(sizes: tuple[int, ...] = (7, 9, 5), seed: int = 0) -> nn.Sequential:
    """Linear layers without biases, so that every parameter is preconditioned."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def batch(fan_in: int = 7, classes: int = 5, rows: int = 17, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, fan_in, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (rows,), generator=generator)


def backward(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    model.zero_grad()
    (token_loss_sum(model(data[0]), data[1]) / len(data[1])).backward()


def changes_after_step(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def dense_updates(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(G, P(G)) of every layer by the explicit Kronecker solve."""
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    dense = dense_factors(model, layers, lambda outputs, rows: token_loss_sum(outputs, rows[1]), data)
    return {name: (f.gradient, kronecker_solve(f.a, f.b, f.gradient, RHO, RHO)) for name, f in dense.items()}


@pytest.mark.parametrize("kappa", [1e-8, 1e-4, 1e6])
def test_kl_clip_is_one_factor_for_the_whole_model(kappa: float) -> None:
    """`ν = min(1, sqrt(κ / Σ lr² <P(G), G>))`; the last κ is too large to clip anything."""
    model, data, lr = mlp(), batch(), 0.3
    expected = dense_updates(model, data)
    divergence = sum(lr**2 * float((p * g).sum()) for g, p in expected.values())
    factor = min(1.0, math.sqrt(kappa / divergence))
    assert (factor == 1.0) == (kappa == 1e6)
    optimizer = hf_so2.build_optimizer("kfac", model, lr=lr, norm_control="kl_clip", kl_clip=kappa, **CONSTANT)
    backward(model, data)
    for name, change in changes_after_step(model, optimizer).items():
        assert relative_error(change, -lr * factor * expected[name][1]) < 1e-9


@given(sizes=st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(2, 12)), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_spectral_control_fixes_the_spectral_norm_of_every_layer(sizes: tuple[int, int, int], seed: int) -> None:
    """`lr · sqrt(fan_out/fan_in)` within 1 %, from the first (cold) step on and over drifting warm starts."""
    model = mlp(sizes, seed)
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.1, norm_control="spectral")
    for step in range(4):
        backward(model, batch(sizes[0], sizes[2], rows=64, seed=seed + step))
        for name, change in changes_after_step(model, optimizer).items():
            target = 0.1 * math.sqrt(change.shape[0] / change.shape[1])
            assert float(torch.linalg.matrix_norm(change, ord=2)) == pytest.approx(target, rel=1e-2), (step, name)


def test_spectral_control_keeps_the_direction() -> None:
    model, data = mlp(), batch()
    expected = dense_updates(model, data)
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.1, norm_control="spectral", **CONSTANT)
    backward(model, data)
    for name, change in changes_after_step(model, optimizer).items():
        direction = expected[name][1] / torch.linalg.vector_norm(expected[name][1])
        assert relative_error(-change / torch.linalg.vector_norm(change), direction) < 1e-9


def test_zero_update_stays_zero_and_the_next_one_is_exact_again() -> None:
    model = nn.Linear(30, 20, bias=False).double()
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.1, norm_control="spectral", momentum=0.0)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 0.0, 1.0):
        inputs = torch.randn(50, 30, generator=generator, dtype=torch.float64)
        costs = torch.randn(50, 20, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        ((model(inputs) * costs).sum() * scale / 50).backward()
        (change,) = changes_after_step(model, optimizer).values()
        target = 0.1 * math.sqrt(20 / 30) * scale
        assert float(torch.linalg.matrix_norm(change, ord=2)) == pytest.approx(target, rel=2e-2)


def test_momentum_is_a_moving_average_of_gradients_before_preconditioning() -> None:
    """`m = μ m + (1-μ) G` from zero, without bias correction: after t equal gradients it is `(1-μ^t) G`."""
    model, data, mu, lr = mlp((7, 5)), batch(), 0.8, 1e-9
    ((_, update),) = dense_updates(model, data).values()
    optimizer = hf_so2.build_optimizer(
        "kfac", model, lr=lr, norm_control="none", **(CONSTANT | {"momentum": mu, "beta2": 0.0})
    )
    for step in range(1, 5):
        backward(model, data)  # the rate is too small to change the gradient
        (change,) = changes_after_step(model, optimizer).values()
        # Differences of weights near 1 resolve 1e-16 of a change near 1e-9.
        assert relative_error(change, -lr * (1 - mu**step) * update) < 1e-5


def test_decoupled_weight_decay_multiplies_the_weight_before_the_update() -> None:
    model, data = mlp((7, 5)), batch()
    weight = model[0].weight.detach().clone()
    ((_, update),) = dense_updates(model, data).values()
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.3, weight_decay=0.2, norm_control="none", **CONSTANT)
    backward(model, data)
    optimizer.step()
    assert relative_error(model[0].weight, (1 - 0.3 * 0.2) * weight - 0.3 * update) < 1e-12


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
def test_every_damping_rule_reaches_the_step(rule: str) -> None:
    """One step with each rule equals the solve with ρ computed by NumPy from the dense factors."""
    model, data = mlp((7, 5)), batch()
    layers = {"0.weight": model[0]}
    dense = dense_factors(model, layers, lambda outputs, rows: token_loss_sum(outputs, rows[1]), data)["0.weight"]
    rho: dict[str, Callable[[np.ndarray], float]] = {
        "trace": lambda x: 0.01 * float(np.trace(x)),
        "trace_mean": lambda x: 0.01 * float(np.trace(x)) / len(x),
        "spectral": lambda x: 0.01 * float(np.linalg.eigvalsh(x)[-1]),
        "constant": lambda x: 0.01,
    }
    a, b = dense.a.numpy(), dense.b.numpy()
    if rule == "pi":
        ratio = math.sqrt(np.trace(a) / 7 / (np.trace(b) / 5))
        rho_a, rho_b = 0.1 * ratio, 0.1 / ratio
    else:
        rho_a, rho_b = rho[rule](a), rho[rule](b)
    weight = model[0].weight.detach().clone()
    settings: dict[str, Any] = {"norm_control": "none", "momentum": 0.0, "damping": 0.01, "damping_rule": rule}
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.5, **settings)
    backward(model, data)
    optimizer.step()
    expected = kronecker_solve(dense.a, dense.b, dense.gradient, rho_a, rho_b)
    assert relative_error((weight - model[0].weight.detach()) / 0.5, expected) < 1e-9


def test_spectral_control_holds_on_a_language_model_in_float32() -> None:
    """New tokens every step turn the updates, so a warm start has to catch up: 3 % at worst, 0.2 % on average."""
    model = llama(64).train()
    optimizer = hf_so2.build_optimizer("kfac", model, lr=0.06)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(12):
        tokens = torch.randint(0, 32, (8, 24), generator=generator).sort(dim=1).values
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, change in changes_after_step(model, optimizer).items():
            if name in optimizer.curvature.layers:
                target = 0.06 * math.sqrt(change.shape[0] / change.shape[1])
                ratios.append(float(torch.linalg.matrix_norm(change, ord=2)) / target)
    assert max(abs(ratio - 1) for ratio in ratios) < 0.03
    assert abs(sum(ratios) / len(ratios) - 1) < 2e-3
