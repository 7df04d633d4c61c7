"""One triangle of a symmetric matrix carries all of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.distributed import Parcel


def random_matrix(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    n=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seed=st.integers(0, 99)
)
def test_a_symmetric_matrix_survives_the_way_bit_for_bit(n: int, dtype: torch.dtype, seed: int) -> None:
    half = random_matrix(n, dtype, seed).triu()
    matrix = half + half.triu(1).mT
    packed = Parcel(matrix, symmetric=True).pack()
    assert packed.shape == (n * (n + 1) // 2,)
    assert sorted(packed.tolist()) == sorted(matrix[tuple(torch.triu_indices(n, n))].tolist())
    arrived = Parcel(torch.zeros_like(matrix), symmetric=True)
    arrived.unpack(packed)
    assert torch.equal(arrived.tensor, matrix)


@given(n=st.integers(1, 20), seed=st.integers(0, 99))
def test_what_is_not_quite_symmetric_arrives_symmetric_and_is_the_same_at_both_ends(n: int, seed: int) -> None:
    sender, receiver = random_matrix(n, torch.float64, seed), torch.zeros(n, n, dtype=torch.float64)
    upper = sender.triu()
    packed = Parcel(sender, symmetric=True).pack()
    for tensor in (sender, receiver):
        Parcel(tensor, symmetric=True).unpack(packed)
        assert torch.equal(tensor, tensor.mT)
        assert torch.equal(tensor.triu(), upper)
    assert torch.equal(sender, receiver)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_other_tensors_are_sent_whole(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape).mT if len(shape) == 2 else torch.ones(shape)
    parcel = Parcel(torch.zeros_like(tensor))
    packed = Parcel(tensor).pack()
    assert packed.numel() == parcel.numel == tensor.numel()
    parcel.unpack(packed)
    assert torch.equal(parcel.tensor, tensor)
