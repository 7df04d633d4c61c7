"""Curvature methods, one small file each. All implement the methods of `hf_so2.curvature.base.CurvatureBlock`."""

from hf_so2.curvature.base import CurvatureBlock, GradientBlock, State, Statistic, TokenBlock
from hf_so2.curvature.ekfac import EKFAC
from hf_so2.curvature.foof import FOOF
from hf_so2.curvature.kfac import KFAC
from hf_so2.curvature.kl_shampoo import KLShampoo
from hf_so2.curvature.muon import Muon
from hf_so2.curvature.parts.blocked import Blocked
from hf_so2.curvature.parts.tied import Tied
from hf_so2.curvature.shampoo import Shampoo
from hf_so2.curvature.soap import SOAP
from hf_so2.curvature.tekfac import TEKFAC
from hf_so2.curvature.tkfac import TKFAC

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "SOAP",
    "TEKFAC",
    "TKFAC",
    "Blocked",
    "CurvatureBlock",
    "GradientBlock",
    "KLShampoo",
    "Muon",
    "Shampoo",
    "State",
    "Statistic",
    "Tied",
    "TokenBlock",
]
