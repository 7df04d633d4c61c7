"""Coordinate check of an optimizer on a model family: does training change every layer alike at every width?

    hf-so2 coord-check quickstart --optim kfac_mup --widths 64 128 256 512 --compare

Prints the exponents and leaves coord_check.json and coord_check.png in --output_dir. Exit code 0 when every judged
exponent is within the tolerance, 1 when one is not, 2 for a user's mistake (one line, no traceback).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig

from hf_so2.cli import parse
from hf_so2.data import DataArguments
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.methods.settings import Settings
from hf_so2.models import ModelArguments, Vocabulary, build_config, require_positions
from hf_so2.mup.coord_check import CoordinateCheck
from hf_so2.mup.coord_run import CHECK_ARGUMENTS, run_coordinate_check
from hf_so2.mup.widths import HeadGrowth
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.coordinates import builder
from hf_so2.transfer.reporting.coordinate_plot import plot_coordinate_check


@dataclass
class CoordinateArguments:
    """What to check; the model, the optimizer and its settings are the training flags."""

    _argument_group_name = "coordinate check"

    widths: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512], metadata={"help": "hidden sizes; the narrowest is the base"}
    )
    seeds: int = field(default=3, metadata={"help": "runs per width"})
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "when to measure"})
    tolerance: float = field(default=0.1, metadata={"help": "how far an exponent may be from 0"})
    batch_size: int = field(default=8, metadata={"help": "sequences per step"})
    sequence_length: int = field(default=64, metadata={"help": "tokens per sequence"})
    compare: bool = field(
        default=False, metadata={"help": "show the standard parametrization beside it (the optimizer without _mup)"}
    )


def check(
    name: str,
    settings: Settings,
    config: PretrainedConfig,
    arguments: CoordinateArguments,
    head: HeadGrowth,
    device: torch.device,
) -> CoordinateCheck:
    """The check of the optimizer `name` with these settings, on models of the family of `config`."""
    given = {"head": head, "device": device, **vars(arguments)}
    return run_coordinate_check(config, name, builder(name, settings), **{key: given[key] for key in CHECK_ARGUMENTS})


def _model_config(arguments: ModelArguments, data: DataArguments) -> PretrainedConfig:
    if arguments.model_name_or_path is not None:
        raise ConfigurationError(
            "model_name_or_path", arguments.model_name_or_path, "must be left out: the check trains fresh models"
        )
    if arguments.width is not None:
        raise ConfigurationError("width", arguments.width, "must be left out: --widths says which")
    return build_config(arguments, Vocabulary(data.vocab_size))


def main() -> int:
    """Runs the check, prints and saves it; 0 when it passed, else 1."""
    arguments, model, data, training = parse(
        (CoordinateArguments, ModelArguments, DataArguments, SecondOrderTrainingArguments)
    )
    name = str(training.optim.value)
    if not training.is_ours(name):
        raise ConfigurationError("optim", name, "must be an optimizer of hf_so2")
    require_folder("output_dir", training.output_dir)
    settings, config = training.optimizer_settings(), _model_config(model, data)
    require_positions(config, arguments.sequence_length, "sequence_length")
    result = check(name, settings, config, arguments, model.head, training.device)
    print(result)
    report, compared = result.to_dict(), None
    if arguments.compare:
        compared = check(name.removesuffix("_mup"), settings, config, arguments, model.head, training.device)
        print(compared)
        report["compared"] = compared.to_dict()
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "coord_check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_coordinate_check(result, output / "coord_check.png", compared)
    print("passed" if result.passed else f"failed: an exponent is beyond ±{arguments.tolerance:g}")
    return 0 if result.passed else 1
