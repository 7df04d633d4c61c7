"""The numbers that are sent for a tensor: all of them, or one triangle of a symmetric matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """A tensor that is sent, or overwritten by the received one.

    Args:
        tensor: the tensor, of any shape.
        owner: the rank that has it.
        symmetric: whether it is a symmetric matrix. The sender's own copy becomes exactly symmetric too, from the upper
            triangle that the other ranks receive.
    """

    tensor: Tensor
    owner: int = 0
    symmetric: bool = False

    @property
    def numel(self) -> int:
        """Number of numbers that are sent."""
        return triangle_size(len(self.tensor)) if self.symmetric else self.tensor.numel()

    def pack(self) -> Tensor:
        """The numbers that are sent, (numel,)."""
        return pack_triangle(self.tensor) if self.symmetric else self.tensor.reshape(-1)

    def unpack(self, packed: Tensor) -> None:
        """Overwrite the tensor with received numbers, (numel,)."""
        if self.symmetric:
            unpack_triangle(packed, self.tensor)
        else:
            self.tensor.copy_(packed.view_as(self.tensor))


def triangle_size(n: int) -> int:
    """Number of entries in a triangle of an (n, n) matrix, diagonal included."""
    return n * (n + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (n, n) as a vector of n(n+1)/2 numbers, without tables of indices.

    The matrix is split into `[[P, Q], [Qᵀ, R]]`. The triangles of P and R form one rectangle, P's above its diagonal
    and R's below, as in LAPACK's rectangular full packed format (Gustavson et al. 2010, ACM TOMS 37(2)).
    """
    n, half = len(matrix), _larger_half(len(matrix))
    packed = matrix.new_empty(triangle_size(n))
    q, folded = _parts(packed, n)
    q.copy_(matrix[:half, half:])
    folded[:, :-half] = 0
    torch.triu(matrix[:half, :half], out=folded[:, -half:])
    if n > half:
        folded[half - n :, : n - half] += matrix[half:, half:].mT.tril()
    return packed


def unpack_triangle(packed: Tensor, matrix: Tensor) -> None:
    """Overwrite a symmetric matrix (n, n) with the numbers that `pack_triangle` packed."""
    n, half = len(matrix), _larger_half(len(matrix))
    q, folded = _parts(packed, n)
    upper = folded[:, -half:].triu()
    torch.add(upper, upper.triu(1).mT, out=matrix[:half, :half])
    matrix[:half, half:] = q
    matrix[half:, :half] = q.mT
    if n > half:
        lower = folded[half - n :, : n - half].tril()
        torch.add(lower, lower.tril(-1).mT, out=matrix[half:, half:])


def _parts(packed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Views of Q and of the rectangle.

    The rectangle needs one more column if both halves are equal. In an odd matrix, the smaller half has one row less.
    """
    half = _larger_half(n)
    q, folded = packed.split([half * (n - half), packed.numel() - half * (n - half)])
    return q.view(half, n - half), folded.view(half, half + (n + 1) % 2)


def _larger_half(n: int) -> int:
    return (n + 1) // 2
