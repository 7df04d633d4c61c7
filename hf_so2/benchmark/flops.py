"""Floating-point operations of each phase, counted as they run, and how many the machine manages in a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count

from hf_so2.benchmark.stopwatch import Stopwatch
from hf_so2.curvature.parts.costs import EIGENDECOMPOSITION

Shape = Sequence[int]

# Of the square product that the machine's rate is measured with.
PRODUCT_SIZE, PRODUCT_ROUNDS = 1024, 10


def _eigh(matrix: Shape, uplo: str = "L", compute_v: bool = True, **_: Any) -> int:
    return round((EIGENDECOMPOSITION if compute_v else 4 / 3) * matrix[-1] ** 3 * math.prod(matrix[:-2]))


def _qr(matrix: Shape, *_: Any, **__: Any) -> int:
    *batch, rows, columns = matrix
    k = min(rows, columns)
    return round((2 * (max(rows, columns) + rows) * k**2 - 4 / 3 * k**3) * math.prod(batch))


def _half_of_qr(matrix: Shape, *_: Any, **__: Any) -> int:
    return _qr(matrix) // 2


def _cholesky(matrix: Shape, *_: Any, **__: Any) -> int:
    return round(matrix[-1] ** 3 / 3 * math.prod(matrix[:-2]))


def _inverse_of_cholesky(matrix: Shape, *_: Any, **__: Any) -> int:
    return round(2 / 3 * matrix[-1] ** 3 * math.prod(matrix[:-2]))


def _solve_triangular(matrix: Shape, other: Shape, *_: Any, **__: Any) -> int:
    return matrix[-1] * math.prod(other)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# What torch does not count itself, after Golub & Van Loan 2013, sections 8.3, 5.2 (with an explicit Q), 4.2.5 and 3.1.
FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._linalg_eigh: _eigh,
    torch.ops.aten.linalg_qr: _qr,
    torch.ops.aten.geqrf: _half_of_qr,
    torch.ops.aten.linalg_householder_product: _half_of_qr,
    torch.ops.aten.linalg_cholesky_ex: _cholesky,
    torch.ops.aten.cholesky_inverse: _inverse_of_cholesky,
    torch.ops.aten.linalg_solve_triangular: _solve_triangular,
    torch.ops.aten.addmm_: addmm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class FlopCounter(Stopwatch):
    """Counts the operations of matrix algebra by phase, in place of seconds; elementwise ones are not counted."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._mode = FlopCounterMode(display=False, custom_mapping=FORMULAS)

    def count(self, work: Callable[[Stopwatch], None]) -> dict[str, float]:
        """The operations of each phase while `work` runs, which is handed this counter to mark them."""
        with self._mode:
            work(self)
            return self.take()

    def _mark(self) -> int:
        return int(self._mode.get_total_flops())


def product_rate(device: torch.device) -> float:
    """Operations per second of a product of two float32 matrices: the most that a phase can reach. Best of several."""
    matrix, stopwatch = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device), Stopwatch(device)
    out = torch.empty_like(matrix)
    return 2 * PRODUCT_SIZE**3 / min(_seconds(matrix, out, stopwatch) for _ in range(PRODUCT_ROUNDS))


def _seconds(matrix: Tensor, out: Tensor, stopwatch: Stopwatch) -> float:
    with stopwatch.span("product"):
        torch.mm(matrix, matrix, out=out)
    return stopwatch.take()["product"]
