"""First-order updates for everything that is not preconditioned, by torch's own functional AdamW and SGD.

As a method of its own, the update equals that of `torch.optim` bit for bit. Next to second-order updates there is no
such reference. AdamW on a CPU then uses torch's fused kernel, which takes a fifth of the time, with the same formula
and state. Each rank updates its own part of a sharded parameter, and keeps the state of this part alone.
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
    """The tensors of one parameter that a step of AdamW reads and writes. For a sharded one, this rank's parts."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @property
    def suits_fused_kernel(self) -> bool:
        # The kernel reads memory in order: it would mix up entries of tensors with different layouts.
        *tensors, _ = self
        return all(
            t.device.type == "cpu" and t.is_contiguous() and t.dtype == self.parameter.dtype for t in tensors
        ) and self.parameter.dtype in (torch.float32, torch.float64)


def largest_gradient(group: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The largest safe magnitude of a gradient's entry: up to it, the first-order state stays finite at every step.

    AdamW: the state is an average of squares. An average of finite numbers is finite, so the limit is the root of the
    largest number of `dtype`.

    SGD: the state is a sum that shrinks by the factor `momentum` at every step. It stays finite as long as each new
    term is at most `1 - momentum` times the largest number. Half of this is left to weight decay, which is added to the
    gradient first. A second limit is `of_finite_square`. The step of SGD is as long as its gradient: a larger gradient
    would move the weights to where no gradient is finite.

    Args:
        group: the parameter group, with the algorithm and its constants.
        dtype: dtype of the parameter and of its state.
    """
    largest = torch.finfo(dtype).max
    if group["algorithm"] != "sgd":
        return math.sqrt(largest)
    return min(largest * (1 - group["momentum"]) / 2, of_finite_square(dtype))


def of_finite_square(dtype: torch.dtype) -> float:
    """The largest magnitude with a finite square in `dtype`, or in float32 if `dtype` is narrower."""
    return math.sqrt(max(torch.finfo(dtype).max, torch.finfo(torch.float32).max))


def first_order_step(
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    beside_second_order: bool = False,
    warmup_steps: int = 1,
) -> None:
    """One step of the group's first-order algorithm, in place, on those of its parameters that need one.

    Args:
        group: the parameter group. In a group of preconditioned weights, `lr` is the learning rate of the method. The
            fallback's learning rate has a fixed ratio to it, `fallback_lr_ratio`.
        parameters: the parameters, all with gradients.
        states: the optimizer's state of each parameter.
        beside_second_order: whether other weights are preconditioned. The run then has no reference in `torch.optim`,
            and AdamW may round differently.
        warmup_steps: the steps of a parameter in which AdamW's learning rate is limited, see `adamw_step`.
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
        peak=group.get("initial_lr", group["lr"]) * group["fallback_lr_ratio"],  # what a schedule multiplies
        warmup_steps=warmup_steps,
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
    peak: float = math.inf,
    warmup_steps: int = 1,
) -> None:
    """One step of `torch.optim.AdamW` on the parameters' `grad`. The state has the keys and dtypes of torch.

    In its own step `t`, counted from 1, a parameter's learning rate is at most `peak t / warmup_steps` until `t` is
    `warmup_steps`: Adam's first steps are the longest, `lr` in every entry however little the gradients are worth.
    """
    for parameter, state in zip(parameters, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    entries = [
        _Entry(local(parameter), gradient, local(state["exp_avg"]), local(state["exp_avg_sq"]), state["step"])
        for parameter, gradient, state in zip(parameters, _gradients(parameters), states, strict=True)
    ]
    alike: dict[tuple[bool, float], list[_Entry]] = {}
    for entry in entries:
        step = int(entry.step) + 1 if warmup_steps > 1 else 1
        rate = lr if step >= warmup_steps else min(lr, peak * step / warmup_steps)
        alike.setdefault((may_be_fused and entry.suits_fused_kernel, rate), []).append(entry)
    for (fused, rate), chosen in alike.items():
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
            lr=rate,
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
    """One step of `torch.optim.SGD` on the parameters' `grad`. As in torch, the gradient includes weight decay."""
    if momentum:
        for parameter, state in zip(parameters, states, strict=True):
            if "momentum_buffer" not in state:
                # torch starts with a copy of the first gradient; a buffer of zeros gives the same.
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
