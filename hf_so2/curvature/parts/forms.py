"""One side of a layer, input or output: its factor is a full matrix, or a diagonal kept as a vector.

Which of the two it is, is read off the tensor itself: one of a single dimension is a diagonal, all others are matrices
or stacks of them (weights with a diagonal side are never stacked), whole or block-diagonal as in
`hf_so2.linalg.block_diagonal`. A side that takes no part (exponent 0) has no tensor, None here. Diagonals are for the
sides of the size of the vocabulary: an embedding's input, whose exact `A` is diagonal, and a language model's logits.

Rows are tensors of shape (rows, n), or integers of shape (rows,): then each row is the unit vector at that index, and
zero where the index is -1. One-hot rows are never written out.

A diagonal in the eigenbases of both sides (EKFAC's `S`, SOAP's `V`) is kept here too: how it moves with the bases, and
what becomes of it where a decomposition leaves them open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.curvature.base import Fold
from hf_so2.linalg import DecompositionError, block_diagonal, damped_root, mean_over_eigenspaces, symmetric_product


def is_one_hot(rows: Tensor) -> bool:
    return not rows.is_floating_point()


def squared_length(rows: Tensor) -> Tensor:
    """`|x|²` of every row, shape (rows, 1)."""
    return (rows >= 0).unsqueeze(1) if is_one_hot(rows) else rows.square().sum(dim=1, keepdim=True)


def second_moment(rows: Tensor, like: Tensor, weights: Tensor | float = 1.0, fold: Fold | None = None) -> Tensor:
    """`Σ w x xᵀ`, or its diagonal, as `like` has it.

    Args:
        rows: (rows, n), or one-hot; one-hot rows ask for a diagonal.
        like: the factor, (n, n), block-diagonal (n, width) or (n,).
        weights: one per row, (rows, 1), or one for all.
        fold: what fewer rows a matrix is made of, as in `TokenBlock.observe`; a diagonal is cheap, and of all rows.
    """
    if is_one_hot(rows):
        counted = (squared_length(rows) * weights).to(like.dtype)
        return sum_by_index(rows, counted, len(like)).squeeze(1)
    if fold is not None and like.ndim == 2:
        rows = fold(rows, None if isinstance(weights, float) else weights.sqrt().to(rows.dtype))
        weights = 1.0
    weighted = rows if isinstance(weights, float) else rows * weights
    if like.ndim == 1:
        return (weighted * rows).sum(dim=0)
    if not block_diagonal.is_cut(like):
        return symmetric_product(weighted, rows)
    parts = block_diagonal.bounds(*like.shape)
    return block_diagonal.of_blocks([symmetric_product(weighted[:, a:b], rows[:, a:b]) for a, b in parts], like)


def in_turn(rows: Tensor, stride: int) -> Tensor:
    """One row of every `stride`, of the g-th group of so many row `g mod stride`; all of fewer rows than one group.

    Thus every position of a sequence has its turn.
    """
    groups = len(rows) // stride
    if stride == 1 or not groups:
        return rows
    group = torch.arange(groups, device=rows.device)
    return rows[group * stride + group % stride]


def sum_by_index(indices: Tensor, values: Tensor, size: int) -> Tensor:
    """Row `i` is the sum of the rows of `values` (rows, k) whose index is `i`, shape (size, k); -1 is left out."""
    kept = values * (indices >= 0).unsqueeze(1)
    return values.new_zeros(size, values.shape[1]).index_add_(0, indices.clamp(min=0), kept)


def root(factor: Tensor, damping: Tensor, exponent: float) -> Tensor:
    """`(X + ρI)^-e` in the form of X.

    Raises:
        DecompositionError: as `hf_so2.linalg.damped_root`.
    """
    if factor.ndim > 1:
        return block_diagonal.each_block(lambda block, rho: damped_root(block, rho, exponent), factor, damping)
    power = (factor + damping).pow(-exponent)
    if not bool(torch.isfinite(power).all()):
        raise DecompositionError(f"a diagonal of {len(factor)} entries has no finite power -{exponent} after damping")
    return power


def from_left(operator: Tensor | None, matrix: Tensor) -> Tensor:
    """`X G`."""
    if operator is None:
        return matrix
    return block_diagonal.times(operator, matrix) if operator.ndim > 1 else operator.unsqueeze(1) * matrix


def from_right(matrix: Tensor, operator: Tensor | None) -> Tensor:
    """`G X`."""
    if operator is None:
        return matrix
    return block_diagonal.times_from_right(matrix, operator) if operator.ndim > 1 else matrix * operator


def transposed(operator: Tensor | None) -> Tensor | None:
    if operator is None or operator.ndim < 2:
        return operator
    # Of one block a view.
    return block_diagonal.each_block(lambda block: block.mT, operator)


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """`(U_newᵀ U_old)²` entry by entry: turns the diagonal of a matrix in the old basis into its diagonal in the
    new.
    """
    parts = zip(block_diagonal.blocks(new), block_diagonal.blocks(old), strict=True)
    return block_diagonal.of_blocks([(mine.mT @ before).square() for mine, before in parts], new)


def over_eigenspaces(
    diagonal: Tensor,
    values_left: Tensor | None,
    values_right: Tensor | None,
    block_size: int | None = None,
) -> Tensor:
    """A diagonal of shape (fan_out, fan_in) averaged over each pair of eigenspaces, given their eigenvalues.

    A side without a basis has none to be averaged over.

    Args:
        block_size: the largest dimension of a block of either basis; None for one. Each block has eigenspaces of its
            own.
    """
    if values_left is not None:
        diagonal = _mean_in_blocks(diagonal, values_left, block_size)
    return diagonal if values_right is None else _mean_in_blocks(diagonal.mT, values_right, block_size).mT


def _mean_in_blocks(diagonal: Tensor, values: Tensor, block_size: int | None) -> Tensor:
    if block_size is None or values.shape[-1] <= block_size:
        return mean_over_eigenspaces(diagonal, values)
    parts = block_diagonal.bounds(values.shape[-1], block_size)
    means = [mean_over_eigenspaces(diagonal[..., a:b, :], values[..., a:b]) for a, b in parts]
    return torch.cat(means, dim=-2)
