"""Following the eigenbasis of a matrix that moves slowly, at less than the cost of decomposing it again."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.linalg.eigen import RESOLUTION, is_finite
from hf_so2.linalg.errors import DecompositionError


def off_diagonal_share(matrix: Tensor) -> Tensor:
    """`|X - diag X|_F / |X|_F`, 0-dim, in [0, 1]; 0 for a zero matrix. In an eigenbasis of X it is round-off."""
    largest = matrix.abs().amax()
    relative = matrix / torch.where(largest > 0, largest, torch.ones_like(largest))
    total, diagonal = relative.square().sum(), relative.diagonal().square().sum()
    return torch.where(total > 0, ((total - diagonal) / total).clamp(min=0).sqrt(), torch.zeros_like(total))


def follow_basis(matrix: Tensor, basis: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """The basis one step of orthogonal iteration closer to the eigenvectors of X: Q of `X U = Q R`.

    The columns of U are first put in descending order of their Rayleigh quotients, so that directions that have
    overtaken others are not held back by them, and so that the result does not depend on the order or the signs in
    which they are passed (Vyas et al. 2024, arXiv 2409.11321, algorithm 4; Wang et al. 2024, arXiv 2405.18144).

    Args:
        matrix: X, symmetric positive semi-definite, shape (n, n), float32 or float64.
        basis: U, shape (n, n), orthonormal columns.
        tolerance: U itself is handed back while the off-diagonal share of `Uᵀ X U` in its Frobenius norm is at most
            this; 0 never skips.

    Returns:
        Estimated eigenvalues of shape (n,) and the basis (n, n), in the same order.

    Raises:
        DecompositionError: `X U` is not finite.
    """
    image = matrix @ basis
    if not is_finite(image):
        raise DecompositionError(f"a {tuple(matrix.shape)} factor is not finite in its tracked basis")
    values = (basis * image).sum(dim=0)
    if tolerance > 0 and bool(off_diagonal_share(basis.mT @ image) <= tolerance):
        return values.clamp(min=0), basis
    # The two halves of `torch.linalg.qr`, which also cuts out the triangle.
    reflectors, scales = torch.geqrf(image[:, values.argsort(descending=True, stable=True)])
    return reflectors.diagonal().abs(), torch.linalg.householder_product(reflectors, scales)


def has_null_space(values: Tensor) -> bool:
    """Whether some eigenvalue is zero within the resolution of a decomposition.

    The vectors of a null space are arbitrary, so that a step of orthogonal iteration from them is arbitrary as well,
    once the space fills: only a full decomposition gives the same basis on every run.

    Args:
        values: eigenvalues of a positive semi-definite matrix, in any order, shape (n,).
    """
    return bool(values.min() <= RESOLUTION * torch.finfo(values.dtype).eps * values.max())
