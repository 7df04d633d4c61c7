"""Tune once, train wide: second-order optimizers with μP for Hugging Face Transformers."""

from hf_so2.versions import require_versions

require_versions()  # before imports that would fail on what an old version lacks, with a message about that

from hf_so2.errors import BrokenStepError, ConfigurationError, TrainingDivergedError  # noqa: E402
from hf_so2.mup import apply_mup, scale_depth, scale_width  # noqa: E402
from hf_so2.optim import OPTIMIZERS, SecondOrderOptimizer, build_optimizer  # noqa: E402
from hf_so2.training.arguments import SecondOrderTrainingArguments  # noqa: E402
from hf_so2.training.factories import second_order, second_order_arguments  # noqa: E402
from hf_so2.training.trainer import SecondOrderTrainer  # noqa: E402
from hf_so2.transfer.coordinates import coordinate_check  # noqa: E402

__all__ = [
    "OPTIMIZERS",
    "BrokenStepError",
    "ConfigurationError",
    "SecondOrderOptimizer",
    "SecondOrderTrainer",
    "SecondOrderTrainingArguments",
    "TrainingDivergedError",
    "apply_mup",
    "build_optimizer",
    "coordinate_check",
    "scale_depth",
    "scale_width",
    "second_order",
    "second_order_arguments",
]
