"""Inverses, damping rules and spectral norms against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared.helpers import numpy_damping, relative_error

from hf_so2.damping import Damping
from hf_so2.linalg import (
    DecompositionError,
    damped_inverse,
    mean_over_eigenspaces,
    roots,
    spectral_norm,
    symmetric_product,
)

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 24)


def gram(seed: int, size: int, rows: int, scale: float = 1.0) -> np.ndarray:
    """A positive semi-definite matrix of rank at most `rows`."""
    samples = np.random.default_rng(seed).normal(size=(rows, size)) * scale
    return samples.T @ samples / rows


@given(seed=SEEDS, size=SIZES, rows=st.integers(1, 40), relative=st.floats(1e-6, 10.0), scale=st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_damped_inverse_equals_numpy(seed: int, size: int, rows: int, relative: float, scale: float) -> None:
    """Rank-deficient factors (fewer rows than dimensions) included."""
    matrix = gram(seed, size, rows, scale)
    rho = relative * np.trace(matrix)
    expected = np.linalg.inv(matrix + rho * np.eye(size))
    actual = damped_inverse(torch.from_numpy(matrix), torch.tensor(rho, dtype=torch.float64))
    # The condition number is at most 1 + 1/relative, and float64 resolves 1e-16.
    assert np.linalg.norm(actual.numpy() - expected) <= 1e-14 * size * (1 + 1 / relative) * np.linalg.norm(expected)
    assert torch.equal(actual, actual.mT)


@given(seed=SEEDS, size=st.integers(2, 24), rows=st.integers(1, 40))
@settings(max_examples=40)
def test_damped_inverse_in_float32(seed: int, size: int, rows: int) -> None:
    matrix = gram(seed, size, rows)
    rho = 1e-3 * np.trace(matrix)
    expected = np.linalg.inv(matrix + rho * np.eye(size))
    actual = damped_inverse(torch.from_numpy(matrix).float(), rho)
    assert actual.dtype == torch.float32
    assert np.linalg.norm(actual.numpy() - expected) <= 1e-3 * np.linalg.norm(expected)


def test_damped_inverse_is_retried_in_float64() -> None:
    """In float32 this matrix is exactly singular, and ρ disappears beside its entries; float64 has room for both."""
    matrix = torch.ones(3, 3)
    inverse = damped_inverse(matrix, 1e-9)
    expected = np.linalg.inv(np.ones((3, 3)) + 1e-9 * np.eye(3))
    np.testing.assert_allclose(inverse.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_what_cannot_be_inverted_is_said(bad: float) -> None:
    matrix = torch.eye(4)
    matrix[2, 2] = bad
    with pytest.raises(DecompositionError, match=r"\(4, 4\)"):
        damped_inverse(matrix, 1e-3)


def test_inverse_that_overflows_is_no_inverse() -> None:
    """1e-40 is a (denormal) number in float32, its inverse is not: nothing non-finite may come back."""
    try:
        inverse = damped_inverse(torch.eye(3) * 1e-40, 1e-43)
    except DecompositionError:
        return
    assert torch.isfinite(inverse).all()


@pytest.fixture
def always_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the way of those whose rows are slow to walk across."""
    monkeypatch.setattr(roots, "LEAST", 1)
    monkeypatch.setattr(roots, "ALIASED_BYTES", 1)


def of_condition(seed: int, size: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """A positive definite matrix with eigenvalues from 1 down to 1/condition, and its inverse, from its eigenbasis."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    values = np.geomspace(1.0, 1 / condition, size)
    return (basis * values) @ basis.T, (basis / values) @ basis.T


@pytest.mark.usefixtures("always_padded")
@given(seed=SEEDS, size=st.integers(1, 70), exponent=st.floats(0, 7), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padding_leaves_the_inverse_as_exact_as_it_is(seed: int, size: int, exponent: float, scale: float) -> None:
    """Within what rounding allows a Cholesky inverse: round-off times the condition, and as much for each dimension."""
    matrix, expected = of_condition(seed, size, 10**exponent)
    for dtype in (torch.float64, torch.float32) if exponent < 5 else (torch.float64,):
        inverse = damped_inverse(torch.from_numpy(matrix * scale).to(dtype), 0.0).double().numpy() * scale
        assert inverse.shape == (size, size)
        bound = 5 * torch.finfo(dtype).eps * size * 10**exponent
        assert np.linalg.norm(inverse - expected) <= bound * np.linalg.norm(expected)


def test_inverse_of_a_size_that_is_padded() -> None:
    size = roots.LEAST
    reflected = np.eye(size) - 2 * np.outer(x := np.linspace(-1, 2, size), x) / (x @ x)
    values = np.geomspace(1.0, 1e-4, size)
    inverse = damped_inverse(torch.from_numpy((reflected * (values - 1e-5)) @ reflected), 1e-5)
    np.testing.assert_allclose(inverse.numpy(), (reflected / values) @ reflected, rtol=1e-10, atol=1e-8)
    assert torch.equal(inverse, inverse.mT)


@pytest.mark.usefixtures("always_padded")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_what_cannot_be_inverted_is_said_of_the_size_that_was_given(bad: float) -> None:
    test_what_cannot_be_inverted_is_said(bad)


@pytest.mark.usefixtures("always_padded")
def test_padded_stacks_are_inverted_one_by_one() -> None:
    stack = torch.from_numpy(np.stack([of_condition(seed, 5, 10.0)[0] for seed in range(3)]))
    dampings = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    for inverse, matrix, rho in zip(damped_inverse(stack, dampings), stack.numpy(), dampings.tolist(), strict=True):
        np.testing.assert_allclose(inverse.numpy(), np.linalg.inv(matrix + rho * np.eye(5)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
@given(seed=SEEDS, dims=st.tuples(SIZES, SIZES), rows=st.integers(1, 30), epsilon=st.floats(1e-6, 10.0))
@settings(max_examples=25)
def test_damping_rules_equal_numpy(rule: str, seed: int, dims: tuple[int, int], rows: int, epsilon: float) -> None:
    a, b = gram(seed, dims[0], rows, 2.0), gram(seed + 1, dims[1], rows, 0.01)
    damping = Damping(rule, epsilon, multiplier_a=3.0, multiplier_b=0.25)
    actual = [float(rho) for rho in damping(torch.from_numpy(a), torch.from_numpy(b))]
    np.testing.assert_allclose(actual, numpy_damping(rule, epsilon, a, b, multipliers=(3.0, 0.25)), rtol=1e-9)


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral", "pi", "constant"])
@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_zero_factor_is_damped_by_a_finite_number(rule: str, zero: str) -> None:
    a, b = torch.eye(3), 2 * torch.eye(4)
    a, b = (a * 0 if zero in ("a", "both") else a), (b * 0 if zero in ("b", "both") else b)
    for factor, rho in zip((a, b), Damping(rule, 1e-3)(a, b), strict=True):
        assert torch.isfinite(rho)
        assert rho > 0
        assert torch.isfinite(damped_inverse(factor, rho)).all()


def start(shape: tuple[int, int], directions: int = 4) -> torch.Tensor:
    return torch.zeros(shape[1], min(directions, *shape), dtype=torch.float64)


@given(seed=SEEDS, shape=st.tuples(SIZES, SIZES), rank=st.integers(1, 24), scale=st.sampled_from([1e-8, 1.0, 1e8]))
@settings(max_examples=60)
def test_subspace_iteration_converges_to_the_spectral_norm(
    seed: int, shape: tuple[int, int], rank: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) * scale
    norm, basis = spectral_norm(torch.from_numpy(matrix), start(shape), 50)
    exact = np.linalg.norm(matrix, 2)
    assert exact * 0.995 <= float(norm) <= exact * (1 + 1e-12)
    # Beyond the rank there is nothing to follow.
    is_followed = basis.any(dim=0)
    assert 1 <= int(is_followed.sum()) <= min(rank, basis.shape[1])
    torch.testing.assert_close(basis.mT @ basis, torch.diag(is_followed.to(torch.float64)))


def test_followed_directions_are_not_of_round_off() -> None:
    """The same matrix with its rows summed in another order has the same directions, however low its rank."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(24, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    matrix = left @ right.mT
    shaken = matrix + 1e-16 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
    _, basis = spectral_norm(matrix, start((24, 24), 16), 8)
    _, other = spectral_norm(shaken, start((24, 24), 16), 8)
    assert relative_error(other, basis) < 1e-10


def test_subspace_iteration_survives_a_zero_matrix() -> None:
    warm = torch.linalg.qr(torch.randn(3, 2, dtype=torch.float64)).Q
    norm, basis = spectral_norm(torch.zeros(5, 3, dtype=torch.float64), warm, 2)
    assert float(norm) == 0.0
    assert torch.equal(basis, warm)
    norm, basis = spectral_norm(torch.zeros(5, 3, dtype=torch.float64), start((5, 3)), 2)
    assert float(norm) == 0.0
    assert torch.isfinite(basis).all()


def test_subspace_iteration_recovers_when_the_warm_start_is_in_the_null_space() -> None:
    """A start orthogonal to every row gives an image of zero, which must not be read as a norm of zero."""
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    norm, _ = spectral_norm(matrix, torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64), 12)
    assert float(norm) == pytest.approx(3.0, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_subspace_iteration_at_the_ends_of_float32(scale: float) -> None:
    """Squares of such entries leave float32's range; the norm itself does not."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 5, generator=generator)
    exact = float(torch.linalg.matrix_norm(matrix, ord=2))
    norm, basis = spectral_norm(matrix * scale, start((6, 5)).float(), 60)
    assert float(norm) == pytest.approx(exact * scale, rel=1e-2, abs=0.0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4))


@given(
    data=st.data(),
    columns=st.integers(1, 5),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_mean_over_eigenspaces(data: st.DataObject, columns: int, groups: list[int], dtype: torch.dtype) -> None:
    """Rows of equal eigenvalues are averaged, whatever their order and however large they are; others stay."""
    labels = np.array(data.draw(st.permutations([label for label, size in enumerate(groups) for _ in range(size)])))
    largest = torch.finfo(dtype).max
    rows = np.random.default_rng(len(labels)).uniform(0.5, 1, (len(labels), columns))
    expected = np.stack([rows[labels == label].mean(axis=0) for label in labels])
    found = mean_over_eigenspaces(torch.from_numpy(rows).to(dtype) * largest, torch.from_numpy(labels + 1.0).to(dtype))
    np.testing.assert_allclose((found / largest).numpy(), expected, rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 301, 512])
@pytest.mark.parametrize("count", [40, 600])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_symmetric_products_equal_numpy(size: int, count: int, is_weighted: bool) -> None:
    """Strips that do and do not divide the size, and sizes and numbers of rows that are not cut; rows that are a slice
    of others.
    """
    rng = np.random.default_rng(size)
    rows = rng.normal(size=(count, size + 3))[:, 2 : size + 2]
    weights = rng.uniform(size=(count, 1)) if is_weighted else np.ones((count, 1))
    found = symmetric_product(torch.from_numpy(rows * weights), torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, (rows * weights).T @ rows, rtol=1e-12, atol=1e-12)
