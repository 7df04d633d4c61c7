"""Every method of the K-FAC family against dense Fisher blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.dense_fisher import (
    CASES,
    DenseBlock,
    approximation,
    dense_preconditioner,
    eye,
    linear_layers,
    loss_sum,
    mlp_case,
    relative,
    stand_still,
    token_gradients,
)
from shared.helpers import DenseFactors, dense_factors
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import grad as func_grad

import hf_so2
from hf_so2.curvature import KFAC
from hf_so2.damping import Damping

RHO = 0.03


@dataclass
class Case:
    """A model with a batch and its dense quantities, by the name of each weight."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    blocks: dict[str, DenseBlock]
    factors: dict[str, DenseFactors]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    model, batch = CASES[request.param]()
    layers = linear_layers(model)
    arguments = (model, layers, loss_sum, batch)
    return Case(model, batch, token_gradients(*arguments), dense_factors(*arguments))


def test_token_gradients_are_those_of_vmap() -> None:
    """Rows of an MLP do not mix, so the oracle must equal the gradients of single examples."""
    model, (inputs, targets) = mlp_case()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, weights, (row,)), target)

    expected = vmap(func_grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    dense = token_gradients(model, linear_layers(model), loss_sum, (inputs, targets))
    for name, block in dense.items():
        assert relative(block.token_gradients, expected[name].detach().numpy()) < 1e-14


def test_token_gradients_are_outer_products_of_h_and_delta(case: Case) -> None:
    for name, block in case.blocks.items():
        outer = torch.einsum("to,ti->toi", case.factors[name].deltas, case.factors[name].inputs)
        assert relative(block.token_gradients, outer.numpy()) < 1e-13


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
def test_s_is_the_diagonal_of_the_dense_block_in_the_kronecker_eigenbasis(case: Case, name: str) -> None:
    optimizer = stand_still(name, case.model, case.batch, damping=RHO)
    for layer, block in case.blocks.items():
        state = optimizer.curvature.layers[layer].state
        basis_a, basis_b = state["A_basis"].numpy(), state["B_basis"].numpy()
        rows = case.factors[layer]
        phi, psi, _ = block.trace_restricted
        factors = (rows.a.numpy(), rows.b.numpy()) if name == "ekfac" else (phi, psi)
        for factor, basis in zip(factors, (basis_a, basis_b), strict=True):
            assert relative(basis.T @ basis, eye(basis)) < 1e-12
            rotated = basis.T @ factor @ basis
            assert np.linalg.norm(rotated - np.diag(rotated.diagonal())) < 1e-11 * np.linalg.norm(factor)
        basis = np.kron(basis_b, basis_a)
        assert relative(state["S"].numpy().ravel(), (basis.T @ block.fisher @ basis).diagonal()) < 1e-10


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
def test_s_is_the_best_diagonal(case: Case, name: str) -> None:
    """Any other diagonal in the basis is further from the block: by exactly the distance between the diagonals."""
    optimizer = stand_still(name, case.model, case.batch, damping=RHO)
    rng = np.random.default_rng(0)
    for layer, block in list(case.blocks.items())[:6]:
        state = optimizer.curvature.layers[layer].state
        basis, fisher = np.kron(state["B_basis"].numpy(), state["A_basis"].numpy()), block.fisher
        error = np.linalg.norm(fisher - approximation(name, state))
        s = state["S"].numpy().ravel()
        product = np.kron(*((f / state["weight"]).numpy() for f in (state["B"], state["A"])))
        kronecker_eigenvalues = (basis.T @ product @ basis).diagonal()
        for other in (s * rng.uniform(0.5, 1.5, len(s)), s + s.mean(), kronecker_eigenvalues, np.zeros(len(s))):
            larger = np.linalg.norm(fisher - basis @ np.diag(other) @ basis.T)
            assert larger > error
            np.testing.assert_allclose(larger**2, error**2 + np.linalg.norm(other - s) ** 2, rtol=1e-9)


@pytest.mark.parametrize(("corrected", "plain"), [("ekfac", "kfac"), ("tekfac", "tkfac")])
def test_the_corrected_diagonal_is_closer_to_the_block(case: Case, corrected: str, plain: str) -> None:
    first, second = (stand_still(name, case.model, case.batch, damping=RHO) for name in (corrected, plain))
    for layer, block in case.blocks.items():
        errors = [
            np.linalg.norm(block.fisher - approximation(name, optimizer.curvature.layers[layer].state))
            for name, optimizer in ((corrected, first), (plain, second))
        ]
        assert errors[0] < errors[1] < np.linalg.norm(block.fisher) * 2, layer


def test_tkfac_keeps_the_trace_of_the_exact_block(case: Case) -> None:
    """Read off the preconditioner too: without its damping, the inverse of what it multiplies with."""
    optimizer = stand_still("tkfac", case.model, case.batch, damping=RHO)
    for layer, block in case.blocks.items():
        state = optimizer.curvature.layers[layer].state
        phi, psi, tau = block.trace_restricted
        assert abs(np.trace(approximation("tkfac", state)) / tau - 1) < 1e-10
        for key, expected in (("A", phi / np.sqrt(tau)), ("B", psi / np.sqrt(tau))):
            undamped = np.linalg.inv(state[f"{key}_root"].numpy()) - RHO * np.eye(len(expected))
            assert np.linalg.norm(undamped - expected) < 1e-10 * (np.linalg.norm(expected) + RHO)


@pytest.mark.parametrize("name", ["kfac", "tkfac", "ekfac", "tekfac", "foof"])
def test_preconditioner_is_the_inverse_of_the_damped_dense_block(case: Case, name: str) -> None:
    optimizer = stand_still(name, case.model, case.batch, damping=RHO)
    for layer, block in list(case.blocks.items())[:8]:
        method, state = optimizer.curvature.layers[layer].block, optimizer.curvature.layers[layer].state
        a, b = case.factors[layer].a.numpy(), case.factors[layer].b.numpy()
        phi, psi, tau = block.trace_restricted
        if name == "kfac":
            damped = np.kron(b + RHO * eye(b), a + RHO * eye(a))
        elif name == "tkfac":
            damped = np.kron(psi / np.sqrt(tau) + RHO * eye(b), phi / np.sqrt(tau) + RHO * eye(a))
        elif name == "foof":
            damped = np.kron(eye(b), a + RHO * eye(a))
        else:
            basis = np.kron(state["B_basis"].numpy(), state["A_basis"].numpy())
            diagonal = (basis.T @ block.fisher @ basis).diagonal()
            damped = basis @ np.diag(diagonal + RHO) @ basis.T
        actual = dense_preconditioner(method, state, block.shape)
        assert relative(actual, np.linalg.inv(damped)) < 1e-10, layer
        update = method.precondition(state, torch.from_numpy(block.gradient))
        assert relative(update.numpy().ravel(), np.linalg.solve(damped, block.gradient.ravel())) < 1e-9, layer


def test_foof_step_is_the_gradient_times_the_inverse_of_a(case: Case) -> None:
    model, batch, modules = case.model, case.batch, linear_layers(case.model)
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    settings = {"momentum": 0.0, "norm_control": "none", "damping_rule": "constant", "damping": RHO}
    optimizer = hf_so2.build_optimizer("foof", model, lr=0.5, **settings)
    (loss_sum(model(batch[0]), batch) / batch[1].numel()).backward()
    optimizer.step()
    for name, block in case.blocks.items():
        a = case.factors[name].a.numpy()
        expected = np.linalg.solve(a + RHO * eye(a), block.gradient.T).T
        assert relative(((before[name] - modules[name].weight.detach()) / 0.5).numpy(), expected) < 1e-9, name


def kronecker_rows(seed: int, fan_in: int = 4, fan_out: int = 3) -> tuple[Tensor, Tensor]:
    """All pairs of some `h` with some `δ`: independent in the sample itself, so the block is exactly `B ⊗ A`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, fan_in, generator=generator, dtype=torch.float64)
    gradients = torch.randn(5, fan_out, generator=generator, dtype=torch.float64)
    return inputs.repeat_interleave(5, dim=0), gradients.repeat(6, 1)


@pytest.mark.parametrize("name", ["kfac", "tkfac", "ekfac", "tekfac"])
def test_methods_are_exact_on_a_linear_net_with_independent_inputs_and_gradients(name: str) -> None:
    """For a loss linear in the output, `δ` is the row's cost pulled back, whatever its input is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    inputs, costs = kronecker_rows(0)

    def linear_loss(outputs: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return (outputs * batch[1]).sum()

    dense = token_gradients(model, linear_layers(model), linear_loss, (inputs, costs))
    optimizer = hf_so2.build_optimizer(
        name, model, lr=1e-30, momentum=0.0, beta2=0.0, norm_control="none", damping_rule="trace", damping=1e-3
    )
    for _ in range(2):
        optimizer.zero_grad()
        (linear_loss(model(inputs), (inputs, costs)) / len(inputs)).backward()
        optimizer.step()
    for layer, block in dense.items():
        assert relative(approximation(name, optimizer.curvature.layers[layer].state), block.fisher) < 1e-12


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi"])
def test_tkfac_is_kfac_where_the_block_is_exactly_kronecker(rule: str) -> None:
    """The factors differ by reciprocal factors only, and these rules make the damping follow."""
    rows = kronecker_rows(1)
    preconditioners = []
    for make in (KFAC, hf_so2.curvature.TKFAC):
        block = make(0.0)
        state = block.init_state((3, 4), torch.device("cpu"), torch.float64)
        sums = block.observe(state, *rows)
        block.update(state, {key: value / len(rows[0]) for key, value in sums.items()})
        block.refresh(state, Damping(rule, 0.01))
        preconditioners.append(dense_preconditioner(block, state, (3, 4)))
    assert relative(*preconditioners) < 1e-12


def svd_power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix)
    return left @ np.diag(values**exponent) @ right


@given(
    seed=st.integers(0, 2**31 - 1),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 20)),
    exponents=st.sampled_from([(0.5, 0.5), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.75), (2.0, 0.5), (0.0, 0.5)]),
)
@settings(max_examples=60)
def test_general_exponents_equal_numpy(seed: int, sizes: tuple[int, int, int], exponents: tuple[float, float]) -> None:
    fan_out, fan_in, rows = sizes
    rng = np.random.default_rng(seed)
    h, delta, g = rng.normal(size=(rows, fan_in)), rng.normal(size=(rows, fan_out)), rng.normal(size=(fan_out, fan_in))
    block = KFAC(0.9, *exponents)
    state = block.init_state((fan_out, fan_in), torch.device("cpu"), torch.float64)
    sums = block.observe(state, torch.from_numpy(h), torch.from_numpy(delta))
    block.update(state, {key: value / rows for key, value in sums.items()})
    block.refresh(state, Damping("constant", RHO))
    power_a = svd_power(h.T @ h / rows + RHO * np.eye(fan_in), -exponents[0])
    power_b = svd_power(delta.T @ delta / rows + RHO * np.eye(fan_out), -exponents[1])
    actual = block.precondition(state, torch.from_numpy(g)).numpy()
    assert relative(actual, power_b @ g @ power_a) < 1e-9
