"""Captured factors and one K-FAC step against the dense definitions, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared.helpers import (
    VOCABULARY,
    DenseFactors,
    captured_factors,
    dense_factors,
    gpt2,
    in_float64,
    kronecker_solve,
    llama,
    relative_error,
    token_loss_sum,
)
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers.pytorch_utils import Conv1D

import hf_so2

RHO = 0.03
PAPER_FAITHFUL = {"damping_rule": "constant", "damping": RHO, "norm_control": "none", "momentum": 0.0}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.GELU(), nn.Linear(6, 5)).double()


def mlp_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(23, 7, generator=generator, dtype=torch.float64), torch.randint(0, 5, (23,), generator=generator)


def lm_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    return tokens, torch.randint(0, VOCABULARY, (3, 8), generator=generator)


def logits_of(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def loss_sum(outputs: Any, batch: tuple[Any, ...]) -> Tensor:
    return token_loss_sum(logits_of(outputs), batch[1])


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map but the head, by the name of its weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], int]] = {
    "mlp": (mlp, mlp_batch, 3),
    "llama": (lambda: in_float64(llama()), lm_batch, 14),
    "gpt2": (lambda: in_float64(gpt2()), lm_batch, 8),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, DenseFactors]]:
    build, make_batch, count = CASES[request.param]
    model, batch = build().train(), make_batch()
    layers = linear_layers(model)
    assert len(layers) == count
    return model, batch, dense_factors(model, layers, loss_sum, batch)


def one_step(model: nn.Module, batch: tuple[Tensor, Tensor], **settings: Any) -> hf_so2.SecondOrderOptimizer:
    optimizer = hf_so2.build_optimizer("kfac", model, **settings)
    (loss_sum(model(batch[0]), batch) / batch[1].numel()).backward()
    optimizer.step()
    return optimizer


def test_captured_factors_equal_the_dense_definition(case: Any) -> None:
    model, batch, dense = case
    captured = captured_factors(one_step(model, batch))
    assert captured.keys() == dense.keys()
    for name, expected in dense.items():
        assert relative_error(captured[name]["A"], expected.a) < 1e-12, name
        assert relative_error(captured[name]["B"], expected.b) < 1e-12, name


def test_kfac_step_equals_the_solve_with_explicit_kronecker_matrices(case: Any) -> None:
    model, batch, dense = case
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(model, batch, lr=0.5, **PAPER_FAITHFUL)
    after = dict(model.named_parameters())
    modules = linear_layers(model)
    for name, expected in dense.items():
        change = (before[name] - after[name].detach()) / 0.5
        if isinstance(modules[name], Conv1D):
            change = change.mT
        solution = kronecker_solve(expected.a, expected.b, expected.gradient, RHO, RHO)
        assert relative_error(change, solution) < 1e-8, name


def test_delta_of_a_row_is_the_derivative_of_its_own_loss() -> None:
    """Rows of an MLP do not mix, so the derivative of the summed loss is the one of each row's own loss."""
    model, (inputs, targets) = mlp(), mlp_batch()
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    dense = dense_factors(model, linear_layers(model), loss_sum, (inputs, targets))

    def losses_after_first_layer(shift: Tensor) -> Tensor:
        hidden = nn.functional.linear(inputs, fixed["0.weight"], fixed["0.bias"]) + shift
        rest = {name: value for name, value in fixed.items() if not name.startswith("0.")}
        outputs = functional_call(model[1:], {f"{int(n[0]) - 1}{n[1:]}": v for n, v in rest.items()}, (hidden,))
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    jacobian = jacrev(losses_after_first_layer)(torch.zeros(23, 9, dtype=torch.float64))
    own = jacobian[torch.arange(23), torch.arange(23)]
    assert relative_error(dense["0.weight"].deltas, own) < 1e-13
    assert float((jacobian.sum(1) - own).detach().abs().max()) < 1e-15


@pytest.mark.parametrize(("fisher_scale", "announced"), [(1.0, False), (64.0, True)])
def test_two_micro_batches_are_one_batch(fisher_scale: float, announced: bool) -> None:
    """Uneven parts of 8 and 15 rows; announced, a loss scaler's factor is undone as well."""
    model, (inputs, targets) = mlp(), mlp_batch()
    dense = dense_factors(model, linear_layers(model), loss_sum, (inputs, targets))
    optimizer = hf_so2.build_optimizer("kfac", model)
    for part in (slice(0, 8), slice(8, 23)):
        if announced:
            optimizer.announce(tokens=len(targets[part]), gradient_scale=fisher_scale / 23)
        (fisher_scale * token_loss_sum(model(inputs[part]), targets[part]) / 23).backward()
    optimizer.step()
    for name, factors in captured_factors(optimizer).items():
        assert relative_error(factors["A"], dense[name].a) < 1e-12
        assert relative_error(factors["B"], dense[name].b) < 1e-12


def test_layer_called_twice_sums_over_both_calls() -> None:
    """`A` averages over all uses, `B` sums them per token (Eschenhagen et al. 2023, equation 22)."""
    torch.manual_seed(0)
    shared = nn.Linear(6, 6, bias=False).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    inputs, targets = torch.randn(11, 6, dtype=torch.float64), torch.randint(0, 6, (11,))
    weight = shared.weight.detach()
    first_shift = torch.zeros(11, 6, dtype=torch.float64)

    def summed(first: Tensor, second: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ weight.T + first)
        return token_loss_sum(hidden @ weight.T + second, targets)

    first, second = torch.func.grad(summed, argnums=(0, 1))(first_shift, first_shift)
    hidden = torch.tanh(inputs @ weight.T)
    optimizer = hf_so2.build_optimizer("kfac", model)
    optimizer.announce(tokens=11, gradient_scale=1 / 11)
    (token_loss_sum(model(inputs), targets) / 11).backward()
    optimizer.step()
    ((_, factors),) = captured_factors(optimizer).items()
    assert relative_error(factors["A"], (inputs.T @ inputs + hidden.T @ hidden) / 22) < 1e-12
    assert relative_error(factors["B"], (first.T @ first + second.T @ second) / 11) < 1e-12


def test_kfac_block_is_exact_when_inputs_and_gradients_are_independent() -> None:
    """One linear layer with loss `cᵀ u` and every pair (h, c): the empirical Fisher is exactly `A ⊗ B`."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    costs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    h, delta = inputs.repeat_interleave(6, dim=0), costs.repeat(5, 1)
    per_token = torch.einsum("ni,nj->nij", h, delta).reshape(30, -1)
    fisher = per_token.mT @ per_token / 30

    model = nn.Linear(4, 3, bias=False).double()
    optimizer = hf_so2.build_optimizer("kfac", model)
    ((model(h) * delta).sum() / 30).backward()
    optimizer.step()
    factors = captured_factors(optimizer)["weight"]
    assert relative_error(torch.kron(factors["A"], factors["B"]), fisher) < 1e-13


def test_averages_are_bias_corrected_and_include_the_current_step() -> None:
    """`X_t = (1-β) Σ β^(t-s) X̂_s / (1-β^t)`, written as a plain weighted mean."""
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = hf_so2.build_optimizer("kfac", model, beta2=0.7, factor_update_steps=1)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(5):
        h = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        seen.append(h.mT @ h / 9)
        optimizer.zero_grad()
        (model(h).sum() / 9).backward()
        optimizer.step()
    weights = [0.7 ** (4 - s) for s in range(5)]
    expected = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
    assert relative_error(captured_factors(optimizer)["weight"]["A"], expected) < 1e-13
