"""What a model computes on an example, as one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_so2.errors import ConfigurationError

from .inputs import example_inputs

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
    first: Exception | None = None
    for inputs in example_inputs(model):
        with torch.random.fork_rng(), torch.set_grad_enabled(grad), evaluating(model):
            try:
                return main_output(model(**inputs))
            except _REFUSALS as error:
                first = first or error
    reason = (str(first).strip().splitlines() or [type(first).__name__])[0]
    allowed = f"must run on {model.main_input_name} alone to be put in muP: {reason}"
    raise ConfigurationError("model", type(model).__name__, allowed) from first


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
