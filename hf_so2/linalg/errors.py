"""The one way in which linear algebra can fail here."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class DecompositionError(ArithmeticError):
    """A matrix that cannot be decomposed, in float64 either: indefinite after damping, or not finite."""


# What a routine of this package can raise: LAPACK's own error where nothing is left to try in float64.
FAILURES = (DecompositionError, torch.linalg.LinAlgError)


class _Retried:
    count = 0


_retried = _Retried()


def retries() -> int:
    """How often this process has tried something again in float64."""
    return _retried.count


def retried_in_float64(decompose: Callable[..., T], *matrices: Tensor, missing: str) -> T:
    """What a routine of LAPACK makes of some matrices, or of the same ones in float64 where it fails.

    Raises:
        DecompositionError: it fails in float64 too; `missing` begins the message.
    """
    try:
        return decompose(*matrices)
    except torch.linalg.LinAlgError:
        _retried.count += 1
        try:
            return decompose(*(matrix.double() for matrix in matrices))
        except torch.linalg.LinAlgError as error:
            raise DecompositionError(f"{missing}: {error}") from error
