"""Which weights get second-order updates, and why the others do not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_so2.errors import ConfigurationError
from hf_so2.layers.adapters import LINEAR, Adapter, adapter_for


@dataclass(frozen=True)
class Treatment:
    """What happens to one parameter.

    Args:
        preconditioned: whether the curvature method takes it; otherwise the fallback does.
        reason: one phrase for the coverage table.
        modules: the modules whose calls use a preconditioned weight.
        adapter: how they store it.
    """

    preconditioned: bool
    reason: str
    modules: tuple[nn.Module, ...] = ()
    adapter: Adapter = LINEAR


def select(
    model: nn.Module, skip_modules: Sequence[str] = (), max_dim: float = math.inf, *, one_sided: bool = False
) -> dict[str, Treatment]:
    """Decide for every trainable parameter, by its name in `model.named_parameters()`.

    Weights of `Linear` and `Conv1D` modules are preconditioned, except the output head, weights tied to an embedding,
    those matched by `skip_modules` and those with a dimension above `max_dim`.

    Args:
        model: any module; the head is what `get_output_embeddings()` names, where there is such a method.
        skip_modules: regular expressions searched for in qualified module names, as in PEFT's `exclude_modules`.
        max_dim: the largest fan_in or fan_out that is preconditioned.
        one_sided: whether a weight with one dimension above `max_dim` is preconditioned on the other side alone.

    Raises:
        ConfigurationError: a pattern is no regular expression or matches no module that could be preconditioned.
    """
    users = _modules_by_weight(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    patterns = [_compiled(pattern) for pattern in skip_modules]
    candidates = [name for uses in users.values() for name, module in uses if adapter_for(module)]
    for pattern in patterns:
        if not any(pattern.search(name) for name in candidates):
            raise ConfigurationError(
                "skip_modules", pattern.pattern, "must match a Linear or Conv1D module of the model"
            )

    def decide(parameter: nn.Parameter) -> Treatment:
        uses = users.get(id(parameter), [])
        modules = tuple(module for _, module in uses)
        if not parameter.numel():
            return Treatment(False, "empty")
        if parameter.ndim < 2:
            return Treatment(False, "a vector: norm gain or bias" if parameter.ndim else "a scalar")
        if any(isinstance(module, nn.Embedding) for module in modules):
            return Treatment(False, "tied to the embedding" if len(modules) > 1 else "an embedding")
        adapters = {adapter_for(module) for module in modules}
        adapter = next(iter(adapters), None)
        if adapter is None or len(adapters) > 1:
            return Treatment(False, f"{parameter.ndim}-D weight of {_kind(modules)}, which no curvature method covers")
        if any(module is head for module in modules):
            return Treatment(False, "the output head")
        if matched := [p.pattern for p in patterns if any(p.search(name) for name, _ in uses)]:
            return Treatment(False, f"skip_modules {matched[0]!r}")
        size = min(parameter.shape) if one_sided else max(parameter.shape)
        if size > max_dim:
            return Treatment(False, f"a dimension of {size} is above max_preconditioner_dim {max_dim}")
        return Treatment(True, f"weight of {_kind(modules)}", modules, adapter)

    return {name: decide(p) for name, p in model.named_parameters() if p.requires_grad}


def _modules_by_weight(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """For every parameter (by identity): the modules that hold it directly, tied ones included."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append((name, module))
    return users


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigurationError("skip_modules", pattern, f"must be a regular expression ({error})") from None


def _kind(modules: Sequence[nn.Module]) -> str:
    return " and ".join(sorted({type(module).__name__ for module in modules}))
