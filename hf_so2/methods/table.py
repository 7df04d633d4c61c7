"""The optimizers by name. A new curvature method is one file in `hf_so2.curvature` and one row here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_so2.curvature import (
    EKFAC,
    FOOF,
    KFAC,
    TEKFAC,
    TKFAC,
    CurvatureBlock,
    KLShampoo,
    Muon,
    Tied,
)
from hf_so2.damping import RULES
from hf_so2.engine.norm_control import NORM_CONTROLS
from hf_so2.errors import ConfigurationError
from hf_so2.methods.blocks import shampoo_block, soap_block
from hf_so2.methods.defaults import CLIPPED, GRADIENTS, SPECTRAL, TOKENS, untuned
from hf_so2.methods.resolution import resolve
from hf_so2.methods.settings import Settings
from hf_so2.methods.site import Site
from hf_so2.methods.width_damping import (
    Multipliers,
    factored_damping,
    gradient_damping,
    single_damping,
    trace_restricted_damping,
    whitened_damping,
)
from hf_so2.mup import ParameterWidth, rules
from hf_so2.spelling import did_you_mean


@dataclass(frozen=True)
class Method:
    """The properties of one optimizer.

    Args:
        name: the name without `_mup`, as in the coverage table and the groups.
        lr_rule: how the learning rate scales with the width, if no norm control sets the size of the updates.
        first_order: the algorithm for all parameters that are not preconditioned: `adamw` or `sgd`.
        block: makes the curvature block of a site; None for a first-order method.
        damping: the width multipliers of the damping, as keywords of `hf_so2.damping.Damping`.
        uses: the parts that settings can refer to; see `Settings`.
        defaults: settings that differ from those of `Settings`.
        defaults_under: by norm control, settings that replace `defaults`: the unit of a learning rate depends on it.
    """

    name: str
    lr_rule: Callable[[Settings], rules.LearningRateRule]
    first_order: str = "adamw"
    block: Callable[[Settings, Site], CurvatureBlock] | None = None
    damping: Callable[[ParameterWidth], Multipliers] = factored_damping
    uses: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    defaults_under: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def learning_rate_rule(self, settings: Settings, *, one_sided: bool = False) -> rules.LearningRateRule:
        """How the learning rate of a preconditioned weight scales with the width under the norm control in use.

        Args:
            settings: the settings, with the norm control.
            one_sided: whether the weight is preconditioned on its input side alone; see `block_for`.
        """
        own = rules.two_sided(settings.exponent_a, 0) if one_sided else self.lr_rule(settings)
        return NORM_CONTROLS[settings.norm_control].width_rule or own

    def damping_multipliers(self, width: ParameterWidth, *, one_sided: bool = False) -> Multipliers:
        """How the damping of a weight scales with the width under the rule `constant`.

        Args:
            width: the weight's role and growth.
            one_sided: as for the learning rate. Damping is then added to `A` itself, for every method.
        """
        return factored_damping(width) if one_sided else self.damping(width)

    def damping_strength(self, settings: Settings, *, factored: bool) -> float:
        """ε of a weight, at the base width.

        Args:
            settings: ε of the method's own blocks, and the rule.
            factored: whether the block is one-sided or tied, and so damps factors for every method; see `block_for`.
                EKFAC damps products of eigenvalues, `S + ε·tr S`, so its `ε = ε_A ε_B`. Each of two equal factors then
                gets √ε.
        """
        is_single = self.damping is single_damping and RULES[settings.damping_rule].is_relative
        return math.sqrt(settings.damping) if factored and is_single else settings.damping

    def block_for(self, settings: Settings, site: Site) -> CurvatureBlock | None:
        """The curvature block of a site, or None for a first-order method.

        With one side, all methods of the K-FAC family are the same: in the eigenbasis of `A` alone, `S` is the spectrum
        of `A`, and without another side there is no trace to restrict. They are also the same for a tied weight: their
        differences apply to one Kronecker product, not to a sum of two.
        """
        if site.tied:
            return Tied(settings.beta2, uniform_head=settings.head_output_factor == "identity")
        if site.one_sided:
            return KFAC(
                settings.beta2, settings.exponent_a, 0.0, diagonal=site.diagonal, block_size=settings.block_size
            )
        return None if self.block is None else self.block(settings, site)

    def for_experts(self, settings: Settings) -> tuple[Method, Settings]:
        """The method, with its settings, for experts that are stored as one 3-D weight.

        It is this method if that needs gradients only, else `expert_method`. The other method keeps the settings that
        both have in common. Its damping is its own default. Its learning rate is this method's, times the ratio of the
        two default learning rates.
        """
        if "tokens" not in self.uses:
            return self, settings
        other = METHODS[settings.expert_method]
        if other.block is None:
            return other, settings
        own, others = (method.settings({"norm_control": settings.norm_control}) for method in (self, other))
        lr = settings.lr * others.lr / own.lr
        momentum = settings.momentum if own.momentum == others.momentum else others.momentum
        return other, replace(settings, lr=lr, momentum=momentum, damping=others.damping)

    def why_not_tied(self, settings: Settings) -> str:
        """Why the fallback updates a weight that is both embedding and head; empty if the weight is preconditioned.

        FOOF does gradient descent on the outputs of a layer. A tied weight has two kinds of outputs, hidden states and
        logits. Their learning rates would have to scale differently with the width.
        """
        if "tokens" not in self.uses:
            return ""
        if "output factors" not in self.uses:
            return f"without output factors, as in {self.name}, its two ends have no common unit"
        if (settings.exponent_a, settings.exponent_b) != (1, 1):
            return "its block is a sum, of which no power but the inverse is known"
        return ""

    def settings(self, given: Mapping[str, Any], **aliases: str) -> Settings:
        """The given settings, then this method's defaults under the norm control in use, then those of `Settings`.

        Args:
            given: the user's settings; None means "not given".
            aliases: other spellings of a setting, alias to name.

        Raises:
            ConfigurationError: an unknown name, a value out of range, or a setting that this method would ignore.
        """
        norm_control = given.get("norm_control") or self.defaults.get("norm_control", Settings.norm_control)
        defaults = {**self.defaults, **self.defaults_under.get(str(norm_control), {})}
        return resolve(self.name, self.uses, defaults, given, **aliases)


CURVATURE = frozenset({"curvature", "momentum"})
INPUT_SIDE = CURVATURE | {"statistics", "damping", "tokens", "factors"}
K_FAC = INPUT_SIDE | {"output factors"}
SHAMPOO = CURVATURE | {"statistics", "gradients", "factors"}


_TABLE = (
    Method(
        "kfac",
        lambda s: rules.two_sided(s.exponent_a, s.exponent_b),
        block=lambda s, site: KFAC(
            s.beta2, s.exponent_a, s.exponent_b, diagonal=site.diagonal, block_size=s.block_size
        ),
        uses=K_FAC | {"exponents"},
        defaults=TOKENS,
        defaults_under=untuned(0.01, CLIPPED, damping=1e-2),
    ),
    Method(
        "ekfac",
        lambda s: rules.KFAC,
        block=lambda s, site: EKFAC(
            s.beta2, diagonal=site.diagonal, moment_stride=s.moment_token_stride, block_size=s.block_size
        ),
        damping=single_damping,
        uses=K_FAC | {"token moments"},
        defaults={**TOKENS, "damping": 1e-5},
        defaults_under=untuned(0.01, CLIPPED, damping=1e-4),
    ),
    Method(
        "tkfac",
        lambda s: rules.two_sided(s.exponent_a, s.exponent_b),
        block=lambda s, site: TKFAC(s.beta2, s.exponent_a, s.exponent_b, site.diagonal, s.block_size),
        damping=trace_restricted_damping,
        uses=K_FAC | {"exponents"},
        defaults=TOKENS,
        defaults_under=untuned(0.01, CLIPPED, damping=1e-2),
    ),
    Method(
        "tekfac",
        lambda s: rules.KFAC,
        block=lambda s, site: TEKFAC(s.beta2, site.diagonal, s.moment_token_stride, s.block_size),
        damping=single_damping,
        uses=K_FAC | {"token moments"},
        defaults={**TOKENS, "damping": 1e-5},
        defaults_under=untuned(0.01, CLIPPED, damping=1e-4),
    ),
    Method(
        "foof",
        lambda s: rules.FOOF,
        block=lambda s, site: FOOF(s.beta2, site.diagonal, s.block_size),
        uses=INPUT_SIDE,
        defaults=TOKENS,
        defaults_under=untuned(0.01, CLIPPED, damping=1e-2),
    ),
    Method(
        "shampoo",
        lambda s: rules.shampoo(0.25) if s.shampoo_exponent == 0.25 else rules.SPECTRAL,
        block=shampoo_block,
        damping=gradient_damping,
        uses=SHAMPOO | {"damping", "shampoo"},
        defaults={**GRADIENTS, "damping": 1e-4},
        defaults_under=untuned(0.03),
    ),
    Method(
        "soap",
        lambda s: rules.SOAP,
        block=soap_block,
        uses=SHAMPOO | {"basis"},
        defaults=GRADIENTS,
        defaults_under=untuned(0.003),
    ),
    Method(
        "kl_shampoo",
        # It whitens like SOAP: where the gradient is noise, the entries of the update have size 1.
        lambda s: rules.SOAP,
        block=lambda s, site: site.cut(KLShampoo(s.beta2, site.sides(s)), s),
        damping=whitened_damping,
        uses=SHAMPOO | {"damping"},
        defaults={**GRADIENTS, "damping": 1e-4},
        defaults_under=untuned(0.003),
    ),
    Method(
        "muon",
        lambda s: rules.SPECTRAL,
        block=lambda s, site: Muon(),
        uses=CURVATURE,
        defaults={**SPECTRAL, "lr": 0.015, "momentum": 0.95, "nesterov": True},
        defaults_under=untuned(0.03),
    ),
    # The defaults are those of transformers' `adamw_torch` and `sgd`. These methods equal them step for step.
    Method("adamw", lambda s: rules.ADAM, defaults={"adam_beta2": 0.999}),
    Method(
        "sgd",
        lambda s: rules.SGD,
        first_order="sgd",
        uses=frozenset({"momentum"}),
        defaults={"lr": 0.1, "momentum": 0.0},
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

MUP_SUFFIX = "_mup"
OPTIMIZERS: tuple[str, ...] = tuple(name + suffix for name in METHODS for suffix in ("", MUP_SUFFIX))
"""Every optimizer name: each method with and without `_mup`."""


def parse_name(name: str) -> tuple[Method, bool]:
    """The method of an optimizer name, and whether it asks for μP.

    Raises:
        ConfigurationError: the name is not in `OPTIMIZERS`.
    """
    if name not in OPTIMIZERS:
        hint = did_you_mean(str(name), OPTIMIZERS)
        raise ConfigurationError("optim", name, f"must be one of {', '.join(OPTIMIZERS)}{hint}")
    return METHODS[name.removesuffix(MUP_SUFFIX)], name.endswith(MUP_SUFFIX)
