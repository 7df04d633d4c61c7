"""The blocks that take more than a line to make from settings and site, for the table."""

from __future__ import annotations

from dataclasses import replace

from hf_so2.curvature import SOAP, GradientBlock, Shampoo
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.methods.settings import Settings
from hf_so2.methods.site import Site
from hf_so2.mup import rules


def shampoo_block(settings: Settings, site: Site) -> GradientBlock:
    """Shampoo with the settings' exponent; the trace is normalised where that is 0.5."""
    exponent, sides = settings.shampoo_exponent, site.sides(settings)
    block = Shampoo(
        settings.beta2, exponent, exponent == 0.5, settings.shampoo_accumulation, sides, settings.shampoo_root
    )
    return site.cut(block, settings)


def soap_block(settings: Settings, site: Site) -> GradientBlock:
    """SOAP; it keeps the momentum in its own coordinates where nothing else needs it."""
    eps = settings.adam_epsilon * rules.damping_multiplier("adam_eps", site.width)
    block = SOAP(settings.beta2, eps, tolerance=settings.basis_tolerance, sides=site.sides(settings))
    cut = site.cut(block, settings)
    # Each block of a cut weight has its own basis. Some norm controls need the average in the weight's coordinates.
    if cut is block and settings.momentum_order == "before" and not NORM_CONTROLS[settings.norm_control].needs:
        return replace(block, keeps_momentum=True)
    return cut
