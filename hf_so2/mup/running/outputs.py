"""What a model computes on an example, as one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_so2.errors import ConfigurationError

from .inputs import Inputs, example_inputs

# What the code of a family raises of inputs that it has not thought of.
_REFUSALS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError)
_SPANS = ("start_logits", "end_logits")


def main_output(output: Any) -> Tensor:
    """What a head computes: its logits; of a head that marks spans both ends, stacked along a new last dimension.

    Raises:
        TypeError: there are none.
    """
    logits = getattr(output, "logits", None)
    if logits is None and all(isinstance(getattr(output, name, None), Tensor) for name in _SPANS):
        logits = torch.stack([getattr(output, name) for name in _SPANS], dim=-1)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(output).__name__} holds no logits")
    return logits


def run_on_example(model: PreTrainedModel, *, grad: bool = False) -> Tensor:
    """Logits of one small example, without dropout or cache; the model and the random state stay as they were.

    Args:
        model: on a real device.
        grad: whether the logits keep their graph.

    Raises:
        ConfigurationError: the model does not run on its main input alone.
    """
    if next(model.parameters()).is_meta:
        raise ConfigurationError("model", type(model).__name__, "must hold its weights, not be on the meta device")
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(grad), evaluating(model):
            return first_output(model, 1, _REFUSALS)[0]
    except _REFUSALS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        allowed = f"must run on {model.main_input_name} alone to be put in muP: {reason}"
        raise ConfigurationError("model", type(model).__name__, allowed) from error


def first_output(model: PreTrainedModel, batch: int, refusals: tuple[type[Exception], ...]) -> tuple[Tensor, Inputs]:
    """What the head computes on the simplest inputs that the model runs on, and those inputs.

    Args:
        model: runs as it is.
        batch: number of examples.
        refusals: errors after which the next inputs are tried.

    Raises:
        Exception: the first of the refusals, where no inputs do.
        ConfigurationError: there are none for its main input.
    """
    first: Exception | None = None
    for inputs in example_inputs(model, batch):
        try:
            return main_output(model(**inputs)), inputs
        except refusals as error:
            first = first or error
    raise first or ConfigurationError("model", type(model).__name__, "takes no inputs that are known")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
