"""Tracks the eigenbasis of a slowly changing matrix, at a lower cost than a new decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.linalg.eigen import RESOLUTION, is_finite
from hf_so2.linalg.errors import DecompositionError


def off_diagonal_share(matrix: Tensor) -> Tensor:
    """`|X - diag X|_F / |X|_F`, shape (...) in [0, 1]; 0 for a zero matrix. In the eigenbasis of X it is round-off."""
    largest = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    relative = matrix / torch.where(largest > 0, largest, torch.ones_like(largest))
    total = relative.square().sum(dim=(-2, -1))
    diagonal = relative.diagonal(dim1=-2, dim2=-1).square().sum(dim=-1)
    return torch.where(total > 0, ((total - diagonal) / total).clamp(min=0).sqrt(), torch.zeros_like(total))


def follow_basis(matrix: Tensor, basis: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration towards the eigenvectors of X. The new basis is Q of `X U = Q R`.

    The columns of U are first sorted by descending Rayleigh quotient. A direction that has overtaken others is then not
    held back by them, and the result does not depend on the order or the signs of the columns (Vyas et al. 2024,
    arXiv 2409.11321, algorithm 4; Wang et al. 2024, arXiv 2405.18144).

    Args:
        matrix: X, symmetric positive semi-definite, shape (..., n, n), float32 or float64.
        basis: U, shape (..., n, n), orthonormal columns.
        tolerance: U itself is returned if the off-diagonal share of `Uᵀ X U`, in Frobenius norm, is at most this; 0
            never skips.

    Returns:
        Estimated eigenvalues of shape (..., n) and the basis (..., n, n), in the same order.

    Raises:
        DecompositionError: `X U` is not finite.
    """
    image = matrix @ basis
    if not is_finite(image):
        raise DecompositionError(f"a {tuple(matrix.shape)} factor is not finite in its tracked basis")
    values = (basis * image).sum(dim=-2)
    stays = None
    if tolerance > 0:
        stays = off_diagonal_share(basis.mT @ image) <= tolerance
        if bool(stays.all()):
            return values.clamp(min=0), basis
    order = values.argsort(dim=-1, descending=True, stable=True)
    # The two parts of `torch.linalg.qr` that are needed. It would also compute the triangle.
    reflectors, scales = torch.geqrf(image.take_along_dim(order.unsqueeze(-2), dim=-1))
    new_values = reflectors.diagonal(dim1=-2, dim2=-1).abs()
    new_basis = torch.linalg.householder_product(reflectors, scales)
    if stays is None:
        return new_values, new_basis
    kept = stays.unsqueeze(-1)
    return torch.where(kept, values.clamp(min=0), new_values), torch.where(kept.unsqueeze(-1), basis, new_basis)


def has_null_space(values: Tensor) -> Tensor:
    """Whether some eigenvalue is zero within the resolution of a decomposition, shape (...).

    The vectors of a null space are arbitrary. When the space fills, a step of orthogonal iteration from them is
    arbitrary too. Only a full decomposition gives the same basis on every run.

    Args:
        values: eigenvalues of a positive semi-definite matrix, in any order, shape (..., n).
    """
    return values.amin(dim=-1) <= RESOLUTION * torch.finfo(values.dtype).eps * values.amax(dim=-1)
