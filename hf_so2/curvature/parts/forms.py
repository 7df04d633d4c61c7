"""One side of a layer, input or output: its factor is a full matrix, or a diagonal kept as a vector.

The tensor itself tells which form it has. A tensor with one dimension is a diagonal. All others are matrices or stacks
of matrices, whole or block-diagonal as in `hf_so2.linalg.block_diagonal`. Weights with a diagonal side are never
stacked. A side that is not used (exponent 0) has no tensor: it is None here. Diagonals are for sides of the size of the
vocabulary: an embedding's input, whose exact `A` is diagonal, and a language model's logits.

Rows are tensors of shape (rows, n), or integers of shape (rows,). An integer stands for the unit vector at that index,
and -1 for a row of zeros. One-hot rows are never expanded.

This file also handles a diagonal in the eigenbases of both sides (EKFAC's `S`, SOAP's `V`): how it changes with the
bases, and its average over eigenspaces whose basis a decomposition does not determine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.curvature.base import Plan
from hf_so2.linalg import DecompositionError, block_diagonal, damped_root, mean_over_eigenspaces, symmetric_product

# A copy of so many rows stays in a cache.
ROWS_AT_A_TIME = 256


def is_one_hot(rows: Tensor) -> bool:
    return not rows.is_floating_point()


def squared_length(rows: Tensor) -> Tensor:
    """`|x|²` of every row, shape (rows, 1)."""
    if is_one_hot(rows):
        return (rows >= 0).unsqueeze(1)
    # On a CPU a copy of all rows needs new memory, which takes longer to get than the squares do.
    parts = rows.split(ROWS_AT_A_TIME) if rows.device.type == "cpu" else [rows]
    return torch.cat([part.square().sum(dim=1, keepdim=True) for part in parts])


def second_moment(rows: Tensor, like: Tensor, weights: Tensor | float = 1.0, plan: Plan | None = None) -> Tensor:
    """`Σ w x xᵀ`, or its diagonal, in the form of `like`.

    Args:
        rows: (rows, n), or one-hot; one-hot rows ask for a diagonal.
        like: the factor, (n, n), block-diagonal (n, width) or (n,).
        weights: one per row, (rows, 1), or one for all.
        plan: how many rows a matrix is computed from. A diagonal is cheap and takes all rows.
    """
    if is_one_hot(rows):
        counted = (squared_length(rows) * weights).to(like.dtype)
        return sum_by_index(rows, counted, len(like)).squeeze(1)
    fold = plan.fold(like.shape[1]) if plan is not None and like.ndim == 2 else None
    if fold is not None:
        rows = fold(rows, None if isinstance(weights, float) else weights.sqrt().to(rows.dtype))
        weights = 1.0
    weighted = rows if isinstance(weights, float) else rows * weights
    if like.ndim == 1:
        return (weighted * rows).sum(dim=0)
    if not block_diagonal.is_cut(like):
        return symmetric_product(weighted, rows)
    parts = block_diagonal.bounds(*like.shape)
    return block_diagonal.of_blocks([symmetric_product(weighted[:, a:b], rows[:, a:b]) for a, b in parts], like)


def in_turn(rows: int, stride: int, device: torch.device) -> tuple[Tensor, float] | None:
    """One row of every group of `stride` rows: row `g mod stride` of group g. None if there is no full group.

    Every position of a sequence is thus taken at some point.

    Returns:
        Their indices, and the number of rows that each stands for.
    """
    groups = rows // stride
    if stride == 1 or not groups:
        return None
    group = torch.arange(groups, device=device)
    return group * stride + group % stride, rows / groups


def sum_by_index(indices: Tensor, values: Tensor, size: int) -> Tensor:
    """Row `i` is the sum of the rows of `values` (rows, k) with index `i`. Shape (size, k). Index -1 is left out."""
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
    # A view if there is one block.
    return block_diagonal.each_block(lambda block: block.mT, operator)


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """`(U_newᵀ U_old)²` entry by entry: maps the diagonal of a diagonal matrix in the old basis to that in the new."""
    parts = zip(block_diagonal.blocks(new), block_diagonal.blocks(old), strict=True)
    return block_diagonal.of_blocks([(mine.mT @ before).square() for mine, before in parts], new)


def over_eigenspaces(
    diagonal: Tensor,
    values_left: Tensor | None,
    values_right: Tensor | None,
    block_size: int | None = None,
) -> Tensor:
    """A diagonal of shape (fan_out, fan_in), averaged over each pair of eigenspaces.

    Args:
        diagonal: the diagonal.
        values_left: eigenvalues of the output side; None for a side without a basis, which is not averaged over.
        values_right: likewise of the input side.
        block_size: the largest dimension of a block of either basis; None for one block. Each block has its own
            eigenspaces.
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
