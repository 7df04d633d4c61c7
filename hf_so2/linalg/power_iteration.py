"""The spectral norm by warm-started power iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_norm(matrix: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Largest singular value of `X` by power iteration on `XᵀX`.

    The estimate approaches the norm from below; a vector kept from a nearby matrix makes one or two iterations enough.

    Args:
        matrix: X, shape (m, n).
        vector: start, shape (n,), of any non-negative length; all zeros asks for a cold start.
        iterations: how many products with `XᵀX`.

    Returns:
        The norm (0-dim, 0 for a zero matrix) and the unit vector for the next call. A zero matrix hands `vector` back
        unchanged, so that an update of zero does not lose the warm start.
    """
    # Products of entries near the ends of the range would leave it; relative to the largest entry they do not.
    largest = matrix.abs().amax()
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    matrix = matrix / unit
    # The row of largest norm is never orthogonal to the leading singular vector in practice, needs no random
    # numbers, and so is the same on every rank and after a resume. It also replaces a start that the matrix maps to
    # zero, from which there would be no way out.
    largest_row = matrix[matrix.square().sum(dim=1).argmax()]
    candidate = torch.where((matrix @ vector).any(), vector, largest_row)
    image = matrix @ candidate
    for _ in range(iterations):
        candidate = matrix.mT @ _normalised(image)
        candidate = _normalised(candidate)
        image = matrix @ candidate
    norm = torch.linalg.vector_norm(image) * unit
    return norm, torch.where(norm > 0, candidate, vector)


def _normalised(vector: Tensor) -> Tensor:
    """`v/|v|`, and zero for the zero vector."""
    length = torch.linalg.vector_norm(vector)
    return vector / torch.where(length > 0, length, torch.ones_like(length))
