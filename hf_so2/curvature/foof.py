"""FOOF: gradient descent on neurons. It is K-FAC's input side alone (Benzing 2022, arXiv 2201.12250, equation 6)."""

from __future__ import annotations

from hf_so2.curvature.kfac import KFAC


def FOOF(  # noqa: N802  named as the method, like its siblings
    beta: float, diagonal: str = "", block_size: int | None = None
) -> KFAC:
    """`P(G) = G (A + ρ_A I)^-1`; see `KFAC` for the state."""
    return KFAC(beta, exponent_a=1.0, exponent_b=0.0, diagonal=diagonal, block_size=block_size)
