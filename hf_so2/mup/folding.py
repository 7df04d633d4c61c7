"""Puts a factor into weights that plain transformers saves and loads, and proves on the model itself that it is there.

A factor `c` on a layer's output that no configuration field can express is multiplied into the layer's weights:
`W_stored = c W`. The table of `rules` speaks of `W`, so the parameter's `ParameterWidth.scale_out` becomes `1 / c` and
every optimizer's rate follows (SGD's with `c^2`, Adam's with `c`): the model and its training are those of the factor
outside, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_so2.errors import ConfigurationError

from .rules import ParameterWidth
from .running import run_on_example

# How many of the last modules before the head may carry the factor.
_CANDIDATES = 3


def fold_into_head_input(model: PreTrainedModel, head: nn.Module, factor: float) -> list[str]:
    """Multiplies the head's input by `factor`, in the last layer before it that can hold it, usually the final norm.

    Args:
        model: on a real device; its parameters change in place, or not at all when an error is raised.
        head: the module whose input is meant.
        factor: for instance `1 / m_in` for a tied head.

    Returns:
        Names of the parameters that now carry the factor.

    Raises:
        ConfigurationError: no layer can hold it, or the model does not run on its main input alone.
    """
    before, executed = _run(model, head)
    for module in islice(executed, _CANDIDATES):
        parameters = {name: p for name, p in module.named_parameters(recurse=False) if name in ("weight", "bias")}
        saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for gain_offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
            with torch.no_grad():
                for name, parameter in parameters.items():
                    offset = gain_offset if name == "weight" else 0.0
                    parameter.copy_((saved[name] + offset) * factor - offset)
            after, _ = _run(model, head)
            if _equal(after, before * factor):
                carriers = {id(parameter) for parameter in parameters.values()}
                return [name for name, parameter in model.named_parameters() if id(parameter) in carriers]
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])
    raise ConfigurationError(
        "tie_word_embeddings", True, f"no layer of {type(model).__name__} can hold the logits' factor; must be False"
    )


def mark_folded(widths: dict[str, ParameterWidth], names: Sequence[str], factor: float) -> None:
    """Notes in `widths` that the stored values of these parameters carry `factor`."""
    for name in names:
        widths[name] = replace(widths[name], scale_out=widths[name].scale_out / factor)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(other.abs().max())
    return scale > 0 and float((one - other).abs().max()) <= tolerance * scale


def _run(model: PreTrainedModel, head: nn.Module) -> tuple[torch.Tensor, list[nn.Module]]:
    """The head's input on an example, and the leaf modules with a weight that ran before it, the last one first."""
    inputs: list[torch.Tensor] = []
    executed: dict[nn.Module, None] = {}

    def record_input(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> None:
        inputs.append((args[0] if args else kwargs["input"]).detach())

    def record_run(module: nn.Module, *_: object) -> None:
        if not inputs:
            executed.pop(module, None)
            executed[module] = None

    handles = [head.register_forward_pre_hook(record_input, with_kwargs=True)]
    for module in model.modules():
        has_weight = isinstance(getattr(module, "weight", None), nn.Parameter)
        if has_weight and module is not head and not isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(record_run))
    try:
        run_on_example(model)
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        raise ConfigurationError(
            "tie_word_embeddings", True, f"{type(model).__name__} does not run its head; must be False"
        )
    return inputs[-1], list(reversed(executed))
