"""What is sent of a tensor: all of it, or of a symmetric matrix one triangle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """A tensor to be sent, and overwritten by what arrives.

    Args:
        tensor: of any shape.
        owner: the rank that has it.
        symmetric: whether it is a symmetric matrix. The sender's own copy is made exactly so too: it ends with the
            upper triangle that the others got.
    """

    tensor: Tensor
    owner: int = 0
    symmetric: bool = False

    @property
    def numel(self) -> int:
        """How many numbers are sent."""
        return triangle_size(len(self.tensor)) if self.symmetric else self.tensor.numel()

    def pack(self) -> Tensor:
        """What is sent, (numel,)."""
        return pack_triangle(self.tensor) if self.symmetric else self.tensor.reshape(-1)

    def unpack(self, packed: Tensor) -> None:
        """Take what arrived, (numel,)."""
        if self.symmetric:
            unpack_triangle(packed, self.tensor)
        else:
            self.tensor.copy_(packed.view_as(self.tensor))


def triangle_size(n: int) -> int:
    """Of an (n, n) matrix, diagonal included."""
    return n * (n + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (n, n) as a vector of n(n+1)/2 numbers, without tables of indices.

    In halves `[[P, Q], [Qᵀ, R]]` the triangles of P and R fold into one rectangle, as in LAPACK's rectangular full
    packed format (Gustavson et al. 2010, ACM TOMS 37(2)): P's above its diagonal, R's below.
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
    """Overwrite a symmetric matrix (n, n) with what `pack_triangle` packed."""
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

    In that an even half needs one column more; the smaller half of an odd matrix has one row less.
    """
    half = _larger_half(n)
    q, folded = packed.split([half * (n - half), packed.numel() - half * (n - half)])
    return q.view(half, n - half), folded.view(half, half + (n + 1) % 2)


def _larger_half(n: int) -> int:
    return (n + 1) // 2
