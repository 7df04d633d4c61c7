"""TEKFAC: EKFAC's corrected diagonal in the eigenbasis of TKFAC's factors (Gao et al. 2020, arXiv 2011.13609)."""

from __future__ import annotations

from hf_so2.curvature.ekfac import EKFAC
from hf_so2.curvature.parts.moments import trace_restricted


def TEKFAC(  # noqa: N802  named as the method, like its siblings
    beta: float, diagonal: str = "", moment_stride: int | None = 1, block_size: int | None = None
) -> EKFAC:
    """`P(G)` as in EKFAC, with `U_A`, `U_B` the eigenbases of `Φ`, `Ψ`; see `EKFAC` for the state."""
    return EKFAC(beta, trace_restricted(diagonal), diagonal, moment_stride, block_size)
