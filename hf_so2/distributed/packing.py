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
        matrix = unpack_triangle(packed, len(self.tensor)) if self.symmetric else packed.view_as(self.tensor)
        self.tensor.copy_(matrix)


def triangle_size(n: int) -> int:
    """Of an (n, n) matrix, diagonal included."""
    return n * (n + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (n, n) as a vector of n(n+1)/2 numbers, without tables of indices.

    In halves `[[P, Q], [Qᵀ, R]]` the triangles of P and R fold into one rectangle, as in LAPACK's rectangular full
    packed format (Gustavson et al. 2010, ACM TOMS 37(2)): P's above its diagonal, R's below.
    """
    half = _larger_half(len(matrix))
    p, q, r = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    folded = matrix.new_zeros(_fold_shape(len(matrix)))
    folded[:, -half:] += p.triu()
    folded[-len(r) or len(folded) :, : len(r)] += r.mT.tril()
    return torch.cat([q.reshape(-1), folded.reshape(-1)])


def unpack_triangle(packed: Tensor, n: int) -> Tensor:
    """The symmetric matrix (n, n) that `pack_triangle` packed."""
    half = _larger_half(n)
    rest = n - half
    q = packed[: half * rest].view(half, rest)
    folded = packed[half * rest :].view(_fold_shape(n))
    upper = folded[:, -half:].triu()
    lower = folded[-rest or len(folded) :, :rest].tril()
    p = upper + upper.triu(1).mT
    r = lower + lower.tril(-1).mT
    return torch.cat([torch.cat([p, q], dim=1), torch.cat([q.mT, r], dim=1)])


def _larger_half(n: int) -> int:
    return (n + 1) // 2


def _fold_shape(n: int) -> tuple[int, int]:
    """Room for both triangles: an even half needs one column more, of an odd matrix the smaller half one row less."""
    half = _larger_half(n)
    return (half, half + 1) if n % 2 == 0 else (half, half)
