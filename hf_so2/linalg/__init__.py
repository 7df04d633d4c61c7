"""Pure functions of tensors: inverses, roots and norms. They know nothing of layers, optimizers or processes."""

from hf_so2.linalg import block_diagonal
from hf_so2.linalg.basis import follow_basis, has_null_space, off_diagonal_share
from hf_so2.linalg.congruence import common_basis
from hf_so2.linalg.eigen import eigh, is_finite, largest_eigenvalue, mean_over_eigenspaces
from hf_so2.linalg.errors import FAILURES, DecompositionError, retries
from hf_so2.linalg.newton import newton_root
from hf_so2.linalg.power_iteration import largest_entry, spectral_norm
from hf_so2.linalg.precision import MATMUL_PRECISIONS, matmul_precision
from hf_so2.linalg.products import per_matrix, symmetric_product, trace
from hf_so2.linalg.roots import damped_inverse, damped_root

__all__ = [
    "FAILURES",
    "MATMUL_PRECISIONS",
    "DecompositionError",
    "block_diagonal",
    "common_basis",
    "damped_inverse",
    "damped_root",
    "eigh",
    "follow_basis",
    "has_null_space",
    "is_finite",
    "largest_eigenvalue",
    "largest_entry",
    "matmul_precision",
    "mean_over_eigenspaces",
    "newton_root",
    "off_diagonal_share",
    "per_matrix",
    "retries",
    "spectral_norm",
    "symmetric_product",
    "trace",
]
