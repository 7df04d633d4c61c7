"""The optimizer's state of sharded parameters, as whole tensors by name. Any number of ranks can resume from it.

torch's own way (`torch.distributed.checkpoint.state_dict`) does not work here. It makes a step with zero gradients and
loads the names that it finds in the state afterwards. In this optimizer such a step is a step of the fallback: the
state has the moments of AdamW in place of the saved momentum, and no curvature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_so2.distributed import assign, is_sharded, local, split_of, whole, world


def is_of_parts(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this rank has only parts of the parameters and of their state."""
    return any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"])


def share_of_state(optimizer: torch.optim.Optimizer, part: int, parts: int) -> dict[str, Any]:
    """One of `parts` shares of the state, all of about the same size; a collective.

    Args:
        optimizer: its groups have `param_names`.
        part: index of the share; a number outside [0, parts) for a rank that only takes part in the collective.
        parts: number of shares.

    Returns:
        `groups`, which is in every share, and `state` by name of the parameter, with whole tensors in host memory.
    """
    named = [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    taken_by = assign({name: float(parameter.numel()) for name, parameter in named}, parts)
    share: dict[str, Any] = {}
    for name, parameter in named:
        # One tensor at a time: no rank has to hold more than one whole tensor.
        for key, value in optimizer.state.get(parameter, {}).items():
            full = whole(local(value), value)
            if taken_by[name] == part:
                share.setdefault(name, {})[key] = full.cpu()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"groups": groups, "state": share}


def load_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load this rank's parts of the state that all shares hold together.

    Raises:
        ValueError: the saved parameters are not those of the optimizer.
    """
    names = [group["param_names"] for group in optimizer.param_groups]
    if names != [group["param_names"] for group in saved["groups"]]:
        raise ValueError("the saved state is of other parameters, or of others together, than the optimizer's")
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer.state[parameter] = {
                key: _as_the_parameter(value, parameter) for key, value in saved["state"].get(name, {}).items()
            }


def _as_the_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """The value, sharded as the parameter is. A tensor of another shape (a count of steps) stays as it is."""
    if value.shape != parameter.shape:
        return value.clone()
    spread = torch.zeros_like(parameter, dtype=value.dtype)
    part = split_of(parameter).part(value, world()[0])
    local(spread).copy_(part)
    return spread
