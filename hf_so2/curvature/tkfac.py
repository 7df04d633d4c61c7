"""TKFAC: K-FAC with factors that keep the trace of the exact block (Gao et al. 2020, arXiv 2011.10741)."""

from __future__ import annotations

from hf_so2.curvature.kfac import KFAC
from hf_so2.curvature.parts.moments import trace_restricted


def TKFAC(  # noqa: N802  named as the method, like its siblings
    beta: float, exponent_a: float = 1.0, exponent_b: float = 1.0, diagonal: str = "", block_size: int | None = None
) -> KFAC:
    """`P(G) = (√τ Ψ + ρ_B I)^-1 G (√τ Φ + ρ_A I)^-1`; see `KFAC` for the state, which also holds `tau`."""
    return KFAC(beta, exponent_a, exponent_b, trace_restricted(diagonal), diagonal, block_size)
