"""`block_size` in the K-FAC family: the formulas with block-diagonal factors, written out densely in NumPy."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.helpers import assert_same_parameters, in_float64, llama, relative_error
from torch import Tensor

import hf_so2
from hf_so2.curvature import EKFAC, FOOF, KFAC, TEKFAC, TKFAC, CurvatureBlock
from hf_so2.curvature.parts.costs import decomposed
from hf_so2.damping import RULES, Damping
from hf_so2.linalg import block_diagonal
from hf_so2.weights.costs import observed_numbers, preconditioner_sent, state_numbers

FAN_OUT, FAN_IN = 5, 7


def parts(size: int, most: int) -> list[np.ndarray]:
    """Indices of each block: lengths that differ by at most one, the longer ones first."""
    return np.array_split(np.arange(size), math.ceil(size / most))


def masked(factor: np.ndarray, most: int) -> np.ndarray:
    mask = np.zeros_like(factor)
    for part in parts(len(factor), most):
        mask[np.ix_(part, part)] = 1
    return factor * mask


def dense_rho(rule: str, epsilon: float, factor: np.ndarray, other: np.ndarray, most: int) -> np.ndarray:
    """ρ of every row: of a block by the rule for that block, under π by the factors as wholes."""
    rho = np.zeros(len(factor))
    for part in parts(len(factor), most):
        block = factor[np.ix_(part, part)]
        pi = np.sqrt(np.trace(factor) / len(factor) / (np.trace(other) / len(other)))
        rho[part] = {
            "trace": lambda block=block: epsilon * np.trace(block),
            "trace_mean": lambda block=block: epsilon * np.trace(block) / len(block),
            "spectral": lambda block=block: epsilon * np.linalg.eigvalsh(block)[-1],
            "pi": lambda pi=pi: pi * np.sqrt(epsilon),
            "constant": lambda: epsilon,
        }[rule]()
    return rho


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def rows(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(FAN_IN, FAN_IN)), rng.normal(size=(FAN_OUT, FAN_OUT))
    inputs, gradients = (rng.normal(size=(count, len(m))) @ m for m in mix)
    return inputs, gradients, rng.normal(size=(FAN_OUT, FAN_IN))


def preconditioned(block: CurvatureBlock, seed: int, damping: Damping, refreshes: int = 1) -> Tensor:
    inputs, gradients, gradient = (torch.from_numpy(x) for x in rows(seed))
    state = block.init_state((FAN_OUT, FAN_IN), torch.device("cpu"), torch.float64)
    for _ in range(refreshes):
        sums = block.observe(state, inputs, gradients)  # type: ignore[attr-defined]
        block.update(state, {name: value / len(inputs) for name, value in sums.items()})
        block.refresh(state, damping)
    return block.precondition(state, gradient)


SIZES = st.integers(1, 8)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**30), most=SIZES)
@pytest.mark.parametrize("exponents", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("rule", RULES)
def test_kfac_and_foof_are_their_formulas_with_block_diagonal_factors(
    rule: str, exponents: tuple[float, float], seed: int, most: int
) -> None:
    inputs, gradients, gradient = rows(seed)
    a, b = inputs.T @ inputs / len(inputs), gradients.T @ gradients / len(gradients)
    if exponents[1] == 0:
        b = np.ones((1, 1))
        block = FOOF(0.9, block_size=most)
    else:
        block = KFAC(0.9, *exponents, block_size=most)
    rho_a = dense_rho(rule, 0.01, a, b, most)
    rho_b = dense_rho(rule, 0.01, b, a, most)
    expected = gradient @ power(masked(a, most) + np.diag(rho_a), -exponents[0])
    if exponents[1]:
        if rule == "pi":
            rho_b = np.full(FAN_OUT, 0.1 / np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b))))
        expected = power(masked(b, most) + np.diag(rho_b), -exponents[1]) @ expected
    actual = preconditioned(block, seed, Damping(rule, 0.01))
    assert relative_error(actual, torch.from_numpy(expected)) < 1e-10


@settings(max_examples=15)
@given(seed=st.integers(0, 2**30), most=SIZES)
def test_tkfac_is_its_formula_with_block_diagonal_factors(seed: int, most: int) -> None:
    inputs, gradients, gradient = rows(seed)
    h2, d2 = (inputs**2).sum(1, keepdims=True), (gradients**2).sum(1, keepdims=True)
    tau = (h2 * d2).mean()
    phi, psi = (d2 * inputs).T @ inputs / len(inputs) / tau, (h2 * gradients).T @ gradients / len(inputs) / tau
    a, b = np.sqrt(tau) * phi, np.sqrt(tau) * psi
    left, right = (power(masked(x, most) + np.diag(dense_rho("trace", 0.01, x, x, most)), -1.0) for x in (b, a))
    actual = preconditioned(TKFAC(0.9, block_size=most), seed, Damping("trace", 0.01))
    assert relative_error(actual, torch.from_numpy(left @ gradient @ right)) < 1e-10


@settings(max_examples=15)
@given(seed=st.integers(0, 2**30), most=SIZES)
@pytest.mark.parametrize("method", [EKFAC, TEKFAC])
def test_ekfac_corrects_the_diagonal_in_the_bases_of_the_blocks(method: Any, seed: int, most: int) -> None:
    """After two refreshes with equal statistics S is between the seed and the second moments, here mixed by β."""
    inputs, gradients, gradient = rows(seed)
    h2, d2 = (inputs**2).sum(1, keepdims=True), (gradients**2).sum(1, keepdims=True)
    a, b = inputs.T @ inputs / len(inputs), gradients.T @ gradients / len(gradients)
    if method is TEKFAC:
        tau = (h2 * d2).mean()
        a, b = ((d2 * inputs).T @ inputs / len(inputs), (h2 * gradients).T @ gradients / len(inputs))
        a, b = a / np.sqrt(tau), b / np.sqrt(tau)
    values_a, basis_a = np.linalg.eigh(masked(a, most))
    values_b, basis_b = np.linalg.eigh(masked(b, most))
    second = ((gradients @ basis_b) ** 2).T @ ((inputs @ basis_a) ** 2) / len(inputs)
    s = 0.9 * np.outer(values_b, values_a) + 0.1 * second
    # Which block an eigenvector of the whole belongs to.
    of_a, of_b = (
        np.array([[np.sum(basis[part, k] ** 2) for part in parts(len(basis), most)] for k in range(len(basis))]).argmax(
            1
        )
        for basis in (basis_a, basis_b)
    )
    rho = np.zeros_like(s)
    for i in range(of_b.max() + 1):
        for j in range(of_a.max() + 1):
            tile = np.ix_(of_b == i, of_a == j)
            rho[tile] = 0.01 * s[tile].sum()
    expected = basis_b @ ((basis_b.T @ gradient @ basis_a) / (s + rho)) @ basis_a.T
    actual = preconditioned(method(0.9, block_size=most), seed, Damping("trace", 0.01), refreshes=2)
    assert relative_error(actual, torch.from_numpy(expected)) < 1e-7


@pytest.mark.parametrize("name", ["kfac", "foof", "tkfac", "ekfac", "tekfac"])
def test_a_block_as_large_as_the_weight_changes_nothing(name: str) -> None:
    ends = [trained(name), trained(name, block_size=48)]
    assert_same_parameters(*ends)


@pytest.mark.parametrize("name", ["kfac", "foof", "tkfac", "ekfac", "tekfac"])
def test_blocks_train_resume_and_report(name: str) -> None:
    settings = {"block_size": 10, "precondition_head": True}
    straight = trained(name, steps=6, **settings)
    model, optimizer = build(name, **settings)
    run(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = build(name, **settings)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(model, optimizer, range(3, 6))
    assert_same_parameters(model, straight)
    numbers = optimizer.telemetry("layer")
    assert all(math.isfinite(value) for value in numbers.values())
    assert any(key.endswith("down_proj.weight/condition") or "condition_A" in key for key in numbers)


def build(name: str, **options: Any) -> tuple[Any, hf_so2.SecondOrderOptimizer]:
    model = in_float64(llama())
    return model, hf_so2.build_optimizer(name, model, lr=0.02, preconditioner_update_steps=2, **options)


def run(model: Any, optimizer: hf_so2.SecondOrderOptimizer, seeds: range) -> None:
    for seed in seeds:
        tokens = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def trained(name: str, steps: int = 4, **options: Any) -> Any:
    model, optimizer = build(name, **options)
    run(model, optimizer, range(steps))
    return model


@given(size=st.integers(1, 60), most=st.integers(1, 70), seed=st.integers(0, 2**30))
def test_the_packed_form_is_the_matrix(size: int, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.from_numpy(masked(torch.randn(size, size, generator=generator, dtype=torch.float64).numpy(), most))
    packed = torch.zeros(size, block_diagonal.width_of(size, most), dtype=torch.float64)
    blocks = [dense[p[0] : p[-1] + 1, p[0] : p[-1] + 1] for p in parts(size, most)]
    packed = block_diagonal.of_blocks(blocks, packed)
    assert packed.shape[1] <= most or size <= most
    right, left = torch.randn(size, 3, generator=generator).double(), torch.randn(3, size, generator=generator).double()
    assert relative_error(block_diagonal.times(packed, right), dense @ right) < 1e-12
    assert relative_error(block_diagonal.times_from_right(left, packed), left @ dense) < 1e-12
    for block, expected in zip(block_diagonal.blocks(packed), blocks, strict=True):
        assert torch.equal(block, expected)


def test_costs_and_traffic_count_blocks() -> None:
    whole, cut = KFAC(0.9), KFAC(0.9, block_size=10)
    assert [(n, width) for _, n, width in decomposed(cut, (20, 40))] == [(40, 10), (20, 10)]
    assert state_numbers(cut, (20, 40)) == 2 * (40 + 20) * 10 + 1
    assert state_numbers(whole, (20, 40)) == 2 * (40**2 + 20**2) + 1
    assert preconditioner_sent(cut, (20, 40)) == (40 + 20) * 10
    assert observed_numbers(cut, (20, 40)) == 0
