"""The decisions for one parameter: the options of its group, its damping and its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_so2.damping import Damping
from hf_so2.distributed import is_sharded, split_of
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.errors import ConfigurationError
from hf_so2.layers import Adapter, Treatment
from hf_so2.methods.damping_overrides import DampingOverrides
from hf_so2.methods.settings import Settings
from hf_so2.methods.site import Site
from hf_so2.methods.table import Method
from hf_so2.methods.width_damping import Multipliers, factored_damping, gradient_damping
from hf_so2.mup import ParameterWidth, rules
from hf_so2.weights.layer import Layer, statistics_dtype

# Damping of an untied embedding. The gradients of tokens much rarer than the mean are too noisy to be amplified more.
EMBEDDING_DAMPING = 1.0


def options_of(
    method: Method,
    settings: Settings,
    treatment: Treatment,
    width: ParameterWidth,
    *,
    one_sided: bool,
    is_decayed: bool,
) -> dict[str, Any]:
    """The hyperparameters of one parameter with width multipliers, as the keys of its group."""
    second_order = method.block is not None and treatment.preconditioned
    first_order_rule = rules.ADAM if method.first_order == "adamw" else rules.SGD
    fallback_lr = settings.fallback_learning_rate or settings.lr
    if treatment.is_added:
        fallback_lr = settings.bias_learning_rate or fallback_lr
    if treatment.is_hidden:
        # A first-order method has one learning rate for hidden matrices, and may have another one for the rest.
        fallback_lr = settings.lr if method.block is None else settings.hidden_fallback_learning_rate or fallback_lr
    lr = settings.lr if second_order else fallback_lr
    rule = method.learning_rate_rule(settings, one_sided=one_sided) if second_order else first_order_rule
    scaled_lr = lr * rules.learning_rate_multiplier(rule, width)
    options: dict[str, Any] = {
        "algorithm": method.name if second_order else method.first_order,
        "lr": scaled_lr,
        "weight_decay": settings.weight_decay * rules.weight_decay_multiplier(rule, width) if is_decayed else 0.0,
    }
    if method.first_order == "sgd":
        return {**options, "momentum": settings.momentum}
    fallback_ratio = 1.0
    if second_order:
        fallback_ratio = fallback_lr * rules.learning_rate_multiplier(rules.ADAM, width) / scaled_lr
        options["momentum"] = settings.momentum
    return {
        **options,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon * rules.damping_multiplier("adam_eps", width),
        "fallback_lr_ratio": fallback_ratio,
    }


def damping_of(
    method: Method,
    settings: Settings,
    treatment: Treatment,
    width: ParameterWidth,
    overrides: DampingOverrides,
    *,
    one_sided: bool,
) -> Damping:
    """The damping of one weight. A tied weight has the damping that its embedding and its head would have if untied."""

    def of(modules: Sequence[nn.Module], epsilon: float, multipliers: Multipliers) -> Damping:
        return overrides.apply(Damping(settings.damping_rule, epsilon, **multipliers), modules)

    counts_tokens = treatment.adapter.one_hot and "tokens" in method.uses
    is_tied = counts_tokens and bool(treatment.head)
    strength = method.damping_strength(settings, factored=one_sided or is_tied)
    if not is_tied:
        epsilon = (settings.embedding_damping or EMBEDDING_DAMPING) if counts_tokens else strength
        return of(treatment.modules, epsilon, method.damping_multipliers(width, one_sided=one_sided))
    as_embedding, as_head = rules.tied_ends(width)
    # Embedding and head add to one sum. Damping as strong as that of an untied embedding would leave no share of the
    # sum to the head. This costs 0.08 nats.
    embedding = of(treatment.modules, settings.embedding_damping or strength, factored_damping(as_embedding))
    return replace(embedding, head=of(treatment.head, strength, factored_damping(as_head)))


def layers_of(
    name: str,
    parameter: nn.Parameter,
    treatment: Treatment,
    method: Method,
    settings: Settings,
    width: ParameterWidth,
    damping: Damping,
    one_sided: bool,
) -> list[Layer]:
    """The layer of a weight, or the layers of the matrices that it holds: of a stack, or of attention heads."""
    adapters = {name: treatment.adapter}
    if treatment.count:
        adapters = {f"{name}[{index}]": replace(treatment.adapter, index=index) for index in range(treatment.count)}
    elif treatment.heads:
        adapters = {
            f"{name}[{head.label}]": replace(treatment.adapter, rows=(head.start, head.stop))
            for head in treatment.heads
        }
    adapter = treatment.adapter
    diagonal = "A" * adapter.one_hot + "B" * treatment.is_head
    fan_out, fan_in = next(iter(adapters.values())).matrix(torch.empty(parameter.shape, device="meta")).shape
    shape = (fan_out, fan_in + adapter.has_bias)
    site = Site(shape, width, diagonal, one_sided, tied=bool(treatment.head) and "tokens" in method.uses)
    block = method.block_for(settings, site)
    assert block is not None
    dtype = statistics_dtype(parameter.dtype)
    split = split_of(parameter) if is_sharded(parameter) else None

    def home(own: Adapter, position: int) -> int | None:
        return split.narrowed(*own.window).home(position) if split and own.window else None

    return [
        Layer(
            own_name,
            site.shape,
            block,
            treatment.modules,
            own_adapter,
            damping,
            parameter.device,
            dtype,
            treatment.partner,
            treatment.head,
            treatment.is_head,
            home(own_adapter, position),
        )
        for position, (own_name, own_adapter) in enumerate(adapters.items())
    ]


def refuse_heads_of_unknown_growth(name: str, method: Method, settings: Settings) -> None:
    """Raise if μP would need to know how a head's size grows, which a model's record does not tell from their number.

    Raises:
        ConfigurationError: `split_heads` with a learning rate or a damping that scales with a matrix's own fan_out.
    """
    is_own = NORM_CONTROLS[settings.norm_control].width_rule is None
    if settings.split_heads and is_own and method.lr_rule(settings).exponents["hidden"][1]:
        fit = ", ".join(control for control, kind in NORM_CONTROLS.items() if kind.width_rule)
        raise ConfigurationError("split_heads", True, f"needs norm_control {fit} with {name}")
    if settings.split_heads and method.damping is gradient_damping and settings.damping_rule == "constant":
        raise ConfigurationError("split_heads", True, f"needs another damping_rule than constant with {name}")


def is_one_sided(treatment: Treatment, method: Method, settings: Settings) -> bool:
    """Whether a K-FAC method preconditions only the input side. Shampoo methods decide by size, see `Site.sides`."""
    return "tokens" in method.uses and treatment.is_head and settings.head_output_factor == "identity"
