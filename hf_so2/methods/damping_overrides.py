"""Another damping for some modules: `pattern=strength` or `pattern=rule:strength`.

A pattern is a regular expression on module names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_so2.damping import RULES, Damping
from hf_so2.errors import ConfigurationError

ALLOWED = (
    "must be a list of pattern=strength or pattern=rule:strength, with a regular expression that is searched for in"
    f" module names, a number above 0, and a rule among {', '.join(RULES)}"
)


@dataclass(frozen=True)
class DampingOverride:
    """One entry of the setting `damping_overrides`.

    Args:
        text: the entry as the user wrote it.
        pattern: a regular expression, searched for in qualified module names, as in `skip_modules`.
        rule: a key of `RULES`, or None for the rule of the setting `damping_rule`.
        epsilon: the strength ε > 0, at the base width.
    """

    text: str
    pattern: re.Pattern[str]
    rule: str | None
    epsilon: float

    @classmethod
    def parse(cls, text: str) -> DampingOverride:
        """Read one entry.

        Raises:
            ValueError: the entry has neither form.
        """
        # The last "=" is the separator: a pattern may contain others.
        pattern, separator, value = text.rpartition("=")
        rule, _, strength = value.rpartition(":")
        epsilon = float(strength)
        if not (separator and pattern and 0 < epsilon < math.inf and (not rule or rule in RULES)):
            raise ValueError(text)
        try:
            return cls(text, re.compile(pattern), rule or None, epsilon)
        except re.error as error:
            raise ValueError(text) from error


def are_overrides(value: object) -> bool:
    """Whether `value` is a list of strings that `DampingOverride.parse` reads."""
    if not isinstance(value, tuple | list):
        return False
    try:
        return all(isinstance(text, str) and DampingOverride.parse(text) is not None for text in value)
    except ValueError:
        return False


class DampingOverrides:
    """The setting `damping_overrides`, applied to one model. If several entries match, the first one counts.

    Args:
        entries: the setting.
        model: the model, for the names of its modules.
    """

    def __init__(self, entries: Sequence[str], model: nn.Module) -> None:
        self._entries = [DampingOverride.parse(text) for text in entries]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._idle = {entry.text for entry in self._entries}

    def apply(self, damping: Damping, modules: Sequence[nn.Module]) -> Damping:
        """The damping of a weight that `modules` use. It is `damping` if no entry matches."""
        matching = [e for e in self._entries if any(e.pattern.search(self._names[id(module)]) for module in modules)]
        self._idle -= {entry.text for entry in matching}
        if not matching:
            return damping
        return replace(damping, rule=matching[0].rule or damping.rule, epsilon=matching[0].epsilon)

    def refuse_idle(self) -> None:
        """Refuse entries without effect. Call it after `apply` of all weights.

        Raises:
            ConfigurationError: an entry has matched no preconditioned weight.
        """
        for entry in self._entries:
            if entry.text in self._idle:
                raise ConfigurationError(
                    "damping_overrides", entry.text, "must match the module of a preconditioned weight"
                )
