"""Depth: deeper configurations, the residual branches of a family, and what a base of another depth does to a model."""

from .configs import depth_growth, scale_depth, text_depth

__all__ = ["depth_growth", "scale_depth", "text_depth"]
