"""Matrix products of float32 tensors with rounded inputs, which are faster in hardware."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MATMUL_PRECISIONS = ("highest", "medium")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """A context in which products of float32 matrices may round their inputs. Sums and results stay float32.

    Args:
        precision: `highest` keeps torch's settings as the user has set them. `medium` rounds inputs to bfloat16 on a
            CPU (8 significant bits; no effect if the CPU lacks such instructions) and to TF32 on an NVIDIA GPU (11
            bits), as `torch.set_float32_matmul_precision` does for a whole program. Other dtypes are not affected.
    """
    if precision == "highest":
        yield
        return
    cpu, gpu = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]  # no stub
    before = cpu.fp32_precision, gpu.fp32_precision
    cpu.fp32_precision, gpu.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
