"""The coordinate check of an optimizer by its name; see `hf_so2.mup.coord_check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.methods.settings import Settings
from hf_so2.methods.table import parse_name
from hf_so2.mup.coord_check import CoordinateCheck
from hf_so2.mup.coord_run import CHECK_ARGUMENTS, BuildOptimizer, run_coordinate_check
from hf_so2.optim import SecondOrderOptimizer
from hf_so2.optim.build import build_from_settings


def coordinate_check(
    base_config: PretrainedConfig,
    optim: str = "kfac_mup",
    widths: Sequence[int] = (64, 128, 256, 512),
    **arguments: Any,
) -> CoordinateCheck:
    """Trains models of several widths for a few steps and fits how their layers' changes depend on the width.

    Args:
        base_config: a configuration of the family, of any width; the narrowest of `widths` is the base of muP.
        optim: a name of `hf_so2.OPTIMIZERS`. Without `_mup` it shows what the standard parametrization does.
        widths: hidden sizes, at least two.
        arguments: `seeds`, `steps`, `tolerance`, `batch_size`, `sequence_length`, `head` and `device` of
            `hf_so2.mup.coord_run.run_coordinate_check`; the rest are settings of the optimizer (`lr`, `damping`,
            ...).

    Returns:
        Measurements, exponents and the verdict `passed`.

    Raises:
        ConfigurationError: an unknown optimizer or setting, or widths that the family cannot have.
    """
    check = {name: arguments.pop(name) for name in CHECK_ARGUMENTS if name in arguments}

    settings = parse_name(optim)[0].settings(arguments, learning_rate="lr")
    return run_coordinate_check(base_config, optim, builder(optim, settings), widths=widths, **check)


def builder(optim: str, settings: Settings) -> BuildOptimizer:
    """What makes the optimizer of each model of a check.

    Without a limit on the fallback's first steps: the check takes few more, its rates are constant, and it measures how
    changes go with the width where every parameter is updated at its rate.
    """
    if settings.fallback_warmup_steps is not None:
        settings = replace(settings, fallback_warmup_steps=1)

    def build(model: PreTrainedModel, base: PretrainedConfig) -> SecondOrderOptimizer:
        return _informed(build_from_settings(optim, model, settings, base), model)

    return build


def _informed(optimizer: SecondOrderOptimizer, model: PreTrainedModel) -> SecondOrderOptimizer:
    """The optimizer, told after every forward pass of `model` what a sampled Fisher matrix and adaptive damping need.

    The check's own loop serves any optimizer of torch and knows of neither.
    """

    def tell(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            optimizer.sample_fisher(outputs.logits)
            optimizer.reevaluate_with(lambda: module(*args, **inputs).loss)  # the check's models have no dropout

    model.register_forward_hook(tell, with_kwargs=True)
    return optimizer
