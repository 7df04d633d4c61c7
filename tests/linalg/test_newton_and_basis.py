"""Inverse roots by coupled Newton and the eigenbasis that is followed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.shampoo_reference import inverse_power, relative

from hf_so2.linalg import (
    DecompositionError,
    damped_root,
    follow_basis,
    has_null_space,
    newton_root,
    off_diagonal_share,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
P = pytest.mark.parametrize("p", [1, 2, 4, 8])


def spd(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (basis * np.geomspace(1 / condition, 1, size)) @ basis.T


@DTYPES
@P
@pytest.mark.parametrize("n", [10, 100])
def test_tridiagonal_roots_have_a_closed_form(n: int, p: int, dtype: torch.dtype) -> None:
    """The second difference has the eigenvalues `4 sin²(πk/2(n+1))` and sines for eigenvectors."""
    k = np.arange(1, n + 1)
    values = 4 * np.sin(np.pi * k / (2 * (n + 1))) ** 2
    vectors = np.sqrt(2 / (n + 1)) * np.sin(np.pi * np.outer(k, k) / (n + 1))
    expected = (vectors * values ** (-1 / p)) @ vectors.T
    matrix = torch.from_numpy(2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)).to(dtype)
    for actual in (newton_root(matrix, 0.0, p), damped_root(matrix, 0.0, 1 / p)):
        assert np.abs(actual.double().numpy() - expected).max() < 1e-4 * expected.max()
    assert newton_root(matrix, 0.0, p).dtype == dtype


@P
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_known_powers_at_every_scale(p: int, scale: float) -> None:
    """`diag(1, 16, 256)` rotated has roots `1, 16^(-1/p), 256^(-1/p)`."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    matrix = torch.from_numpy(scale * (basis * [1.0, 16.0, 256.0]) @ basis.T).float()
    expected = scale ** (-1 / p) * (basis * np.array([1.0, 16.0, 256.0]) ** (-1 / p)) @ basis.T
    assert relative(newton_root(matrix, 0.0, p), expected) < 2e-5


@P
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 1e8])
def test_damping_of_a_singular_matrix(p: int, damping: float) -> None:
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(6, 2))
    matrix = factor @ factor.T
    expected = inverse_power(matrix + damping * np.eye(6), 1 / p)
    assert relative(newton_root(torch.from_numpy(matrix), torch.tensor(damping), p), expected) < 1e-6


@given(
    seed=st.integers(0, 2**31 - 1),
    size=st.integers(1, 12),
    p=st.sampled_from([1, 2, 4, 8]),
    log_condition=st.floats(0, 6),
)
def test_newton_equals_the_eigendecomposition(seed: int, size: int, p: int, log_condition: float) -> None:
    matrix = spd(np.random.default_rng(seed), size, 10**log_condition)
    root = newton_root(torch.from_numpy(matrix), 0.0, p)
    assert relative(root, inverse_power(matrix, 1 / p)) < 1e-7
    assert torch.equal(root, root.mT)


@pytest.mark.parametrize("bad", ["zero", "indefinite", "nan", "inf", "overflow"])
def test_what_has_no_root_is_refused(bad: str) -> None:
    matrices = {
        "zero": torch.zeros(3, 3),
        "indefinite": torch.diag(torch.tensor([1.0, -1.0, 2.0])),
        "nan": torch.full((3, 3), torch.nan),
        "inf": torch.eye(3) * torch.inf,
        "overflow": torch.eye(3, dtype=torch.float32) * 1e-44,
    }
    with pytest.raises(DecompositionError):
        newton_root(matrices[bad], 0.0, 1)


@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 8), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_a_followed_basis_does_not_depend_on_order_or_signs(seed: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    matrix = torch.from_numpy(spd(rng, size, 1e3) * scale).float()
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(size, size)))[0]).float()
    shuffled = basis[:, rng.permutation(size)] * torch.from_numpy(rng.choice([-1.0, 1.0], size=size)).float()
    (values, first), (other_values, second) = (follow_basis(matrix, start) for start in (basis, shuffled))
    assert relative(other_values, values) < 1e-5
    assert relative((first * second).sum(dim=0).abs(), np.ones(size)) < 1e-4
    assert relative(first.mT @ first, np.eye(size)) < 1e-5


def test_a_followed_basis_arrives_at_the_eigenvectors() -> None:
    rng = np.random.default_rng(0)
    matrix = spd(rng, 6, 1e3)
    basis = torch.eye(6, dtype=torch.float64)
    for _ in range(40):
        values, basis = follow_basis(torch.from_numpy(matrix), basis)
    # Entry by entry: a share out of two squared norms is known to the root of round-off only.
    rotated = basis.mT.numpy() @ matrix @ basis.numpy()
    assert np.linalg.norm(rotated - np.diag(np.diag(rotated))) < 1e-12 * np.linalg.norm(rotated)
    assert relative(values, np.geomspace(1, 1e-3, 6)) < 1e-12


def test_a_basis_that_still_fits_is_handed_back() -> None:
    rng = np.random.default_rng(0)
    matrix = spd(rng, 6, 10.0)
    vectors = torch.from_numpy(np.linalg.eigh(matrix)[1])
    noise = rng.normal(size=(6, 6))
    noisy = torch.from_numpy(matrix + 1e-3 * (noise + noise.T))
    share = float(off_diagonal_share(vectors.mT @ noisy @ vectors))
    rotated = vectors.mT.numpy() @ noisy.numpy() @ vectors.numpy()
    assert abs(share / (np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(rotated)) - 1) < 1e-9
    values, kept = follow_basis(noisy, vectors, tolerance=share * 1.01)
    assert kept is vectors
    assert relative(values, np.diag(rotated)) < 1e-12
    assert not torch.equal(follow_basis(noisy, vectors, tolerance=share * 0.99)[1], vectors)
    assert not torch.equal(follow_basis(noisy, vectors)[1], vectors)


def test_off_diagonal_share_of_nothing() -> None:
    assert off_diagonal_share(torch.zeros(3, 3)) == 0
    assert off_diagonal_share(torch.eye(3) * 1e30) == 0
    assert off_diagonal_share(torch.tensor([[0.0, 1e-30], [1e-30, 0.0]])) == 1


def test_null_spaces_are_found_within_round_off() -> None:
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert has_null_space(torch.linalg.eigvalsh(rows.mT @ rows))
    assert not has_null_space(torch.linalg.eigvalsh(rows @ rows.mT))
    assert has_null_space(torch.zeros(4))


def test_following_what_is_not_finite_is_refused() -> None:
    with pytest.raises(DecompositionError):
        follow_basis(torch.full((3, 3), torch.inf), torch.eye(3))
