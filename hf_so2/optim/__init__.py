"""The optimizer: how it is built, its one step pipeline, and its state."""

from hf_so2.methods.settings import Settings
from hf_so2.methods.table import OPTIMIZERS
from hf_so2.optim.build import build_optimizer
from hf_so2.optim.coverage import CoverageReport
from hf_so2.optim.optimizer import SecondOrderOptimizer

__all__ = ["OPTIMIZERS", "CoverageReport", "SecondOrderOptimizer", "Settings", "build_optimizer"]
