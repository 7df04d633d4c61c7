"""The error for failures of linear algebra, and the retry in float64."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class DecompositionError(ArithmeticError):
    """A matrix cannot be decomposed, not even in float64: it is indefinite after damping, or not finite."""


# The errors that a routine of this package can raise. It raises LAPACK's own error if no retry in float64 is left.
FAILURES = (DecompositionError, torch.linalg.LinAlgError)


class _Retried:
    count = 0


_retried = _Retried()


def retries() -> int:
    """Number of retries in float64 that this process has made."""
    return _retried.count


def retried_in_float64(decompose: Callable[..., T], *matrices: Tensor, missing: str) -> T:
    """The result of a LAPACK routine for some matrices. If it fails, the routine is retried with them in float64.

    Raises:
        DecompositionError: the retry fails too. The message begins with `missing`.
    """
    try:
        return decompose(*matrices)
    except torch.linalg.LinAlgError:
        _retried.count += 1
        try:
            return decompose(*(matrix.double() for matrix in matrices))
        except torch.linalg.LinAlgError as error:
            raise DecompositionError(f"{missing}: {error}") from error
