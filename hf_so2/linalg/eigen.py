"""Eigendecompositions of positive semi-definite matrices."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_so2.linalg.errors import DecompositionError, retried_in_float64

# The error of an eigenvalue is about one unit of round-off of the largest one, measured on null spaces of up to 512
# dimensions.
RESOLUTION = 8.0

# Whether eigenvalues are all distinct, with the version of the tensor for which this was computed. Every step needs it.
# It is computed again only if the eigenvalues have changed, to avoid a wait for the device.
_all_distinct: MutableMapping[Tensor, tuple[int, bool]] = WeakTensorKeyDictionary()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, `X = U diag(λ) Uᵀ`. Retried in float64 if the working precision fails.

    Args:
        matrix: symmetric positive semi-definite, shape (..., n, n), float32 or float64.

    Returns:
        λ of shape (..., n), ascending, with negative round-off set to zero, and U of shape (..., n, n).

    Raises:
        DecompositionError: the matrix is not finite, or the iteration does not converge in float64 either.
    """
    values, vectors = _decomposed(torch.linalg.eigh, matrix)
    return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """λ_max of a symmetric positive semi-definite matrix, shape (...,) for (..., n, n). Fails and retries as `eigh`."""
    values: Tensor = _decomposed(torch.linalg.eigvalsh, matrix)
    return values[..., -1].clamp(min=0).to(matrix.dtype)


def is_finite(matrix: Tensor) -> bool:
    """Whether every entry is finite. The sum is not finite if an entry is not, and is much cheaper to check."""
    return bool(torch.isfinite(matrix.sum())) or bool(torch.isfinite(matrix).all())


def _decomposed(decompose: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    if not is_finite(matrix):
        raise DecompositionError(f"a {tuple(matrix.shape)} factor is not finite")
    return retried_in_float64(decompose, matrix, missing=f"a {tuple(matrix.shape)} factor has no eigendecomposition")


def mean_over_eigenspaces(matrix: Tensor, values: Tensor) -> Tensor:
    """The matrix with each row replaced by the mean of the rows of the same eigenspace.

    Eigenvalues closer than the resolution of a decomposition count as one. Their eigenvectors may be any basis of the
    space that they span, and differ from run to run by more than round-off.

    Args:
        matrix: one row for each eigenvalue, shape (..., n, m).
        values: eigenvalues of a positive semi-definite matrix, in any order, shape (..., n).

    Returns:
        The means, (..., n, m); `matrix` itself if all eigenvalues are distinct.
    """
    version, are_distinct = _all_distinct.get(values, (-1, False))
    if version == values._version and are_distinct:
        return matrix
    ascending, order = values.sort(dim=-1)
    is_gap = ascending.diff(dim=-1) > RESOLUTION * torch.finfo(values.dtype).eps * ascending[..., -1:]
    if version != values._version:
        are_distinct = bool(is_gap.all())
        _all_distinct[values] = values._version, are_distinct
        if are_distinct:
            return matrix
    if values.ndim == 1:
        return _means(matrix, is_gap, order)
    stack = (matrix.flatten(end_dim=-3), is_gap.flatten(end_dim=-2), order.flatten(end_dim=-2))
    return torch.stack([_means(*member) for member in zip(*stack, strict=True)]).reshape(matrix.shape)


def _means(matrix: Tensor, is_gap: Tensor, order: Tensor) -> Tensor:
    """Means over the rows between two gaps of the ascending eigenvalues; `order` is their order in `matrix`."""
    space = torch.cat([is_gap.new_zeros(1), is_gap]).cumsum(dim=0)
    # There are as many bags as rows, and the last ones are empty: only the device knows the number of spaces. Unlike
    # sums by index, bags add in the same order on every run, also on a GPU. Ranks thus stay equal.
    starts = torch.searchsorted(space, torch.arange(len(space), device=space.device))
    sizes = torch.cat([starts, starts.new_full((1,), len(space))]).diff()
    # Weights, since the sum of large entries can overflow although their mean does not.
    weights = sizes[space].to(matrix.dtype).reciprocal()
    means = torch.nn.functional.embedding_bag(order, matrix, starts, mode="sum", per_sample_weights=weights)
    return means[space[order.argsort()]]
