"""The hyperparameters that a step needs."""

from __future__ import annotations

from typing import Protocol


class StepSettings(Protocol):
    """The part of `hf_so2.methods.settings.Settings` that every step reads."""

    @property
    def momentum(self) -> float: ...

    @property
    def momentum_order(self) -> str: ...

    @property
    def nesterov(self) -> bool: ...

    @property
    def norm_control(self) -> str: ...

    @property
    def kl_clip(self) -> float: ...

    @property
    def adaptive_damping(self) -> bool: ...

    @property
    def curvature_matmul_precision(self) -> str: ...
