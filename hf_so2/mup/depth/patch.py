"""What a base of another depth does to a model: its residual branches are multiplied by base depth over depth.

This is CompleteP with alpha = 1 (Dey et al. 2025, arXiv 2505.01618): `h + (L0 / L) F(h)`. Where a family has a residual
multiplier in its configuration, that takes the factor; elsewhere it is folded into each branch's last weight. Both are
saved and loaded by plain transformers. Rates, damping, Adam's epsilon and decay follow by the table of `rules`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.errors import ConfigurationError
from hf_so2.mup.roles import layer_pattern_of
from hf_so2.mup.rules import ParameterWidth
from hf_so2.mup.running import run_on_example

from .branches import (
    find_branches,
    fold_branches,
    layer_prefixes,
    make_probe,
    prove,
    prove_fold,
    refusal,
    with_factor,
)
from .configs import depth_growth, text_depth


@dataclass(frozen=True)
class ResidualMultiplier:
    """A family's own multiplier of its residual branches.

    Args:
        families: `model_type` of the language model's configuration, as a regular expression.
        field: of that configuration, in proportion to the multiplier.
        attribute: of the layers, the multiplier that they use.
        value: the multiplier, from the configuration.
    """

    families: str
    field: str
    attribute: str
    value: Callable[[Any], float]


RESIDUAL_MULTIPLIERS = (
    ResidualMultiplier(
        "granite.*|hyperclovax|neomme", "residual_multiplier", "residual_multiplier", lambda c: c.residual_multiplier
    ),
    ResidualMultiplier(
        "minicpm3", "scale_depth", "residual_scale", lambda c: c.scale_depth / math.sqrt(c.num_hidden_layers)
    ),
)


class DepthPatch:
    """The change of a model by its growth in depth, planned without touching it.

    Args:
        model: the model.
        base: the base configuration, of the model's family, or a base module.
        widths: of the model's parameters.
        pretrained: whether the weights are kept.

    Raises:
        ConfigurationError: the base is of another depth, and the model's residual branches cannot take a factor.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PretrainedConfig | nn.Module,
        widths: dict[str, ParameterWidth],
        pretrained: bool,
    ) -> None:
        self._model, self._pretrained = model, pretrained
        self.base_depth = self.depth = 0
        self._growth = 1.0
        if not (isinstance(model, PreTrainedModel) and isinstance(base, PretrainedConfig)):
            _refuse_other_depth(model, base)
            return
        self._growth = depth_growth(base, model.config)
        if self._growth == 1.0:
            return
        self.base_depth, self.depth = text_depth(base), text_depth(model.config)
        probe = make_probe(type(model), base)
        self._branches, terms = find_branches(probe, widths)
        self._check_layers(model, probe, widths)
        # What the branches are to be multiplied with, beyond what the family's own multiplier does already.
        self._own = _residual_multiplier(model.config)
        own = 1.0 if self._own is None else self._own.value(_text(model.config)) / self._own.value(_text(base))
        self._factor = 1 / (self._growth * own)
        if abs(self._factor - 1) < 1e-12:
            self._factor = 1.0
        if self._own is not None and not pretrained:
            plain, wanted = run_on_example(probe), with_factor(probe, terms, self._factor)
            _set_multiplier(probe, self._own, self._factor)
            if self._factor != 1.0:
                prove(wanted, plain, run_on_example(probe), probe)
        else:
            prove_fold(probe, self._branches, terms)

    def apply(self, widths: dict[str, ParameterWidth], notes: list[str]) -> None:
        """Multiplies the branches, and notes in `widths` what is inside of them and what carries the factor."""
        if self._growth == 1.0:
            return
        assert isinstance(self._model, PreTrainedModel)
        by_config = self._own is not None and not self._pretrained
        if by_config:
            assert self._own is not None
            value = _set_multiplier(self._model, self._own, self._factor)
            where = f"config.{self._own.field} = {value:g}"
        else:
            where = ("attributed to " if self._pretrained else "folded into ") + ", ".join(self._branches.carriers)
            if not self._pretrained:
                # Pretrained weights are taken to carry the factor already: only their rates change.
                fold_branches(self._model, self._branches, self._factor)
        for name, width in list(widths.items()):
            if layer_pattern_of(name) in self._branches.inside:
                widths[name] = replace(width, depth=self._growth)
            if layer_pattern_of(name) in self._branches.carriers and not by_config:
                widths[name] = replace(widths[name], scale_out=width.scale_out / self._factor)
        layers = f"{self.base_depth} layers to {self.depth}"
        notes.append(f"residual branches times {1 / self._growth:g}, {layers}: {where}")

    def _check_layers(
        self, model: PreTrainedModel, probe: PreTrainedModel, widths: Mapping[str, ParameterWidth]
    ) -> None:
        """Refuses a model with projections in layers without branches, or in layers that do not grow as the depth."""
        of_base = layer_prefixes(name for name, _ in probe.named_parameters())
        own = layer_prefixes(name for name, _ in model.named_parameters())
        hidden = layer_prefixes(name for name, width in widths.items() if width.role == "hidden")
        with_branches = layer_prefixes(iter(self._branches.inside))
        for prefix, layers in own.items():
            before, after = len(of_base.get(prefix, ())), len(layers)
            if prefix in hidden and after != before * (self._growth if prefix in with_branches else 1.0):
                allowed = "grow otherwise than the depth" if prefix in with_branches else "have no residual branches"
                raise refusal(probe, f"{before} to {after} {prefix} {allowed}")


def _refuse_other_depth(model: nn.Module, base: PretrainedConfig | nn.Module) -> None:
    """A module from outside transformers has no call that its branches could be found by."""
    if not isinstance(base, nn.Module):
        return
    names = [{layer_pattern_of(name): 0 for name, _ in module.named_parameters()} for module in (model, base)]
    counts = [len(list(module.parameters())) for module in (model, base)]
    if counts[0] != counts[1] and names[0].keys() == names[1].keys():
        allowed = f"must be as deep as the model, {type(model).__name__}: its residual branches are not known"
        raise ConfigurationError("base_config", f"{type(base).__name__} of another depth", allowed)


def _text(config: PretrainedConfig) -> Any:
    return config.get_text_config(decoder=True)


def _residual_multiplier(config: PretrainedConfig) -> ResidualMultiplier | None:
    return next((own for own in RESIDUAL_MULTIPLIERS if re.fullmatch(own.families, _text(config).model_type)), None)


def _set_multiplier(model: PreTrainedModel, own: ResidualMultiplier, factor: float) -> float:
    """Multiplies the family's own multiplier, in the configuration and in the layers that were built from it."""
    text = _text(model.config)
    value: float = getattr(text, own.field) * factor
    setattr(text, own.field, value)
    for module in model.modules():
        if isinstance(vars(module).get(own.attribute), (int, float)):
            setattr(module, own.attribute, getattr(module, own.attribute) * factor)
    return value
