"""First-order updates for everything that is not preconditioned, by torch's own functional AdamW and SGD.

One call per parameter group, so that the update is that of `torch.optim` bit for bit. Of sharded parameters each rank
updates its part, and keeps the state of that part alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hf_so2.distributed import local


def first_order_step(group: Mapping[str, Any], parameters: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
    """One step of the group's first-order algorithm, in place, on those of its parameters that need one.

    Args:
        group: the parameter group; in one of preconditioned weights `lr` follows the method, and its ratio to the
            fallback's rate, `fallback_lr_ratio`, is fixed.
        parameters: with gradients.
        states: the optimizer's state of each.
    """
    if group["algorithm"] == "sgd":
        sgd_step(parameters, states, lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])
        return
    adamw_step(
        parameters,
        states,
        lr=group["lr"] * group["fallback_lr_ratio"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"] / group["fallback_lr_ratio"],
    )


def adamw_step(
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of `torch.optim.AdamW` on the parameters' `grad`; state keys and dtypes are those of torch."""
    for parameter, state in zip(parameters, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    adamw(
        [local(parameter) for parameter in parameters],
        _gradients(parameters),
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def sgd_step(
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of `torch.optim.SGD` (weight decay in the gradient, as there) on the parameters' `grad`."""
    if momentum:
        for parameter, state in zip(parameters, states, strict=True):
            if "momentum_buffer" not in state:
                # torch starts with a copy of the first gradient, which is what comes of zeros.
                state["momentum_buffer"] = torch.zeros_like(parameter)
    sgd(
        [local(parameter) for parameter in parameters],
        _gradients(parameters),
        [local(state["momentum_buffer"]) if momentum else None for state in states],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
