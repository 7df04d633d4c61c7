"""The one way in which linear algebra can fail here."""

import torch


class DecompositionError(ArithmeticError):
    """A matrix that cannot be decomposed, in float64 either: indefinite after damping, or not finite."""


# What a routine of this package can raise: LAPACK's own error where nothing is left to try in float64.
FAILURES = (DecompositionError, torch.linalg.LinAlgError)
