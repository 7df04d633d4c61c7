"""Block-diagonal matrices, kept as one tensor: the blocks are stacked vertically, (n, width) for n rows.

A dimension n above the size of a block is cut into `⌈n / size⌉` parts. Their lengths differ by at most one: a small
leftover part would have factors of mere noise. The width is the length of the longest part. The last column of a
shorter part stays zero. A square matrix is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def width_of(size: int, most: int | None) -> int:
    """The width of a matrix of `size` rows in blocks of at most `most` dimensions; None for one block."""
    return size if most is None else -(-size // parts_of(size, most))


def parts_of(size: int, most: int) -> int:
    return -(-size // most)


def bounds(size: int, most: int) -> Iterator[tuple[int, int]]:
    """The range (begin, end) of each part."""
    count = parts_of(size, most)
    longer = size % count
    return pairwise(accumulate([size // count + (part < longer) for part in range(count)], initial=0))


def is_cut(matrix: Tensor) -> bool:
    """Whether the matrix has more than one block."""
    return matrix.shape[-1] < matrix.shape[-2]


def blocks(matrix: Tensor) -> list[Tensor]:
    """The blocks as views, each (..., k, k)."""
    if not is_cut(matrix):
        return [matrix]
    return [matrix[..., start:end, : end - start] for start, end in bounds(*matrix.shape[-2:])]


def of_blocks(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The block-diagonal matrix of these blocks, in the shape of `like`."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.zeros_like(like)
    for own, part in zip(blocks(whole), parts, strict=True):
        own.copy_(part)
    return whole


def each_block(apply: Callable[..., Tensor], matrix: Tensor, *others: Tensor) -> Tensor:
    """The block-diagonal matrix of a function's result for each block.

    Args:
        apply: the function of a block and of its number in each of `others`.
        matrix: the block-diagonal matrix.
        others: numbers, one for each block, shape (..., blocks); (...) if there is one block.
    """
    if not is_cut(matrix):
        return apply(matrix, *others)
    parts = blocks(matrix)
    numbers = [other.unbind(dim=-1) for other in others]
    return of_blocks([apply(part, *of_part) for part, *of_part in zip(parts, *numbers, strict=True)], matrix)


def measure(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """A number for each block, shape (..., blocks); (...) if there is one block."""
    if not is_cut(matrix):
        return function(matrix)
    return torch.stack([function(block) for block in blocks(matrix)], dim=-1)


def times(matrix: Tensor, right: Tensor) -> Tensor:
    """`X G`, shape of G, (..., n, k)."""
    if not is_cut(matrix):
        return matrix @ right
    rows = zip(blocks(matrix), bounds(*matrix.shape[-2:]), strict=True)
    return torch.cat([block @ right[..., start:end, :] for block, (start, end) in rows], dim=-2)


def times_from_right(left: Tensor, matrix: Tensor) -> Tensor:
    """`G X`, shape of G, (..., k, n)."""
    if not is_cut(matrix):
        return left @ matrix
    columns = zip(blocks(matrix), bounds(*matrix.shape[-2:]), strict=True)
    return torch.cat([left[..., start:end] @ block for block, (start, end) in columns], dim=-1)
