"""Curvature methods: one small file each, all with the four verbs of `hf_so2.curvature.base.CurvatureBlock`."""

from hf_so2.curvature.base import CurvatureBlock, State, Statistic
from hf_so2.curvature.kfac import KFAC

__all__ = ["KFAC", "CurvatureBlock", "State", "Statistic"]
