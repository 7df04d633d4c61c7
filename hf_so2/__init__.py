"""Tune once, train wide: second-order optimizers with μP for Hugging Face Transformers."""

from hf_so2.arguments import SecondOrderTrainingArguments
from hf_so2.errors import ConfigurationError, TrainingDivergedError
from hf_so2.factories import second_order, second_order_arguments
from hf_so2.mup import apply_mup, scale_width
from hf_so2.optim import OPTIMIZERS, SecondOrderOptimizer, build_optimizer
from hf_so2.trainer import SecondOrderTrainer
from hf_so2.transfer.coordinates import coordinate_check

__all__ = [
    "OPTIMIZERS",
    "ConfigurationError",
    "SecondOrderOptimizer",
    "SecondOrderTrainer",
    "SecondOrderTrainingArguments",
    "TrainingDivergedError",
    "apply_mup",
    "build_optimizer",
    "coordinate_check",
    "scale_width",
    "second_order",
    "second_order_arguments",
]
