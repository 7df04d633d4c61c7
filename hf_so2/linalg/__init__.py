"""Pure functions of tensors: inverses, roots and norms. Nothing here knows of layers, optimizers or processes."""

from hf_so2.linalg.power_iteration import spectral_norm
from hf_so2.linalg.roots import DecompositionError, damped_inverse

__all__ = ["DecompositionError", "damped_inverse", "spectral_norm"]
