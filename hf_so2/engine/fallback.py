"""First-order updates for everything that is not preconditioned, by torch's own functional AdamW and SGD.

As a method, the update is that of `torch.optim` bit for bit. Beside second-order updates, which have no such reference,
AdamW on a CPU is torch's fused kernel, a fifth of the time with the same formula and state. Of sharded parameters each
rank updates its part, and keeps the state of that part alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hf_so2.distributed import local


class _Entry(NamedTuple):
    """What a step of AdamW reads and writes of one parameter, of sharded ones this rank's part."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @property
    def suits_fused_kernel(self) -> bool:
        # The kernel reads memory in order, so that it would mix up entries of tensors that are laid out differently.
        *tensors, _ = self
        return all(
            t.device.type == "cpu" and t.is_contiguous() and t.dtype == self.parameter.dtype for t in tensors
        ) and self.parameter.dtype in (torch.float32, torch.float64)


def largest_gradient(group: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The magnitude up to which no entry of a gradient can make the first-order state infinite, for ever.

    An average of squares in range stays there, so that what enters it is all there is to look at. A sum that shrinks by
    `momentum` at every step stays there while what is added is at most `1 - momentum` of the range; half of that is
    left to weight decay, which is added to the gradient before. In SGD, whose step is as long as its gradient, one
    whose square leaves float32 would throw the weights to where no gradient is finite.

    Args:
        group: with the algorithm and its constants.
        dtype: of the parameter, and so of its state.
    """
    largest = torch.finfo(dtype).max
    if group["algorithm"] != "sgd":
        return math.sqrt(largest)
    return min(largest * (1 - group["momentum"]) / 2, of_finite_square(dtype))


def of_finite_square(dtype: torch.dtype) -> float:
    """The largest magnitude with a finite square, in float32 for what is narrower."""
    return math.sqrt(max(torch.finfo(dtype).max, torch.finfo(torch.float32).max))


def first_order_step(
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    beside_second_order: bool = False,
) -> None:
    """One step of the group's first-order algorithm, in place, on those of its parameters that need one.

    Args:
        group: the parameter group; in one of preconditioned weights `lr` follows the method, and its ratio to the
            fallback's rate, `fallback_lr_ratio`, is fixed.
        parameters: with gradients.
        states: the optimizer's state of each.
        beside_second_order: whether other weights are preconditioned, so that nothing else tells AdamW's round-off.
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
        may_be_fused=beside_second_order,
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
    may_be_fused: bool = False,
) -> None:
    """One step of `torch.optim.AdamW` on the parameters' `grad`; state keys and dtypes are those of torch."""
    for parameter, state in zip(parameters, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    entries = [
        _Entry(local(parameter), gradient, local(state["exp_avg"]), local(state["exp_avg_sq"]), state["step"])
        for parameter, gradient, state in zip(parameters, _gradients(parameters), states, strict=True)
    ]
    are_fused = [may_be_fused and entry.suits_fused_kernel for entry in entries]
    for fused in (True, False):
        chosen = [entry for entry, is_fused in zip(entries, are_fused, strict=True) if is_fused == fused]
        if not chosen:
            continue
        weights, gradients, averages, squares, steps = map(list, zip(*chosen, strict=True))
        adamw(
            weights,
            gradients,
            averages,
            squares,
            [],
            steps,
            # None is torch's own choice.
            foreach=False if fused else None,
            fused=True if fused else None,
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
