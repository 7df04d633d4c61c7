"""Values of transformers' own fields that it takes without a word, or refuses without their names."""

from __future__ import annotations

from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

from hf_so2.errors import ConfigurationError
from hf_so2.spelling import did_you_mean

_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# A number of steps, or below 1 a share of them, and the field that switches it on.
_INTERVALS = {"logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": "eval_strategy"}


def check_own_fields(args: Any) -> None:
    """Look at the fields of any kind of `TrainingArguments`, before its own `__post_init__` does.

    Raises:
        ConfigurationError: a count that is none, a choice that does not exist, or a length of training below 0.
    """
    for name, choices in _enumerations():
        value = getattr(args, name)
        if value is not None and getattr(value, "value", value) not in choices:
            hint = did_you_mean(str(value), choices)
            raise ConfigurationError(name, value, f"must be one of {', '.join(choices)}{hint}")
    for name in _COUNTS:
        value = getattr(args, name)
        if not _is(value, Integral):
            raise ConfigurationError(name, value, "must be a whole number of at least 1")
        if value < 1:
            raise ConfigurationError(name, value, "must be at least 1")
    steps, epochs, warmup = args.max_steps, args.num_train_epochs, args.warmup_steps
    if not _is(steps, Integral) or steps == 0 or steps < -1:
        raise ConfigurationError("max_steps", steps, "must be a whole number of at least 1, or -1 for num_train_epochs")
    if not _is(epochs, Real) or epochs < 0:
        raise ConfigurationError("num_train_epochs", epochs, "must be a number of at least 0")
    if warmup is not None and (not _is(warmup, Real) or warmup < 0):
        allowed = "must be a number of at least 0; below 1 it is a share of all steps"
        raise ConfigurationError("warmup_steps", warmup, allowed)
    for name, strategy in _INTERVALS.items():
        value, chosen = getattr(args, name), getattr(args, strategy)
        if getattr(chosen, "value", chosen) != "steps" or value is None:
            continue
        if not _is(value, Real) or value <= 0:
            allowed = f"must be a number above 0 where {strategy} is steps; below 1 it is a share of all steps"
            raise ConfigurationError(name, value, allowed)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@cache
def _enumerations() -> tuple[tuple[str, list[str]], ...]:
    """Every field but `optim` whose type is an enumeration, with its values."""
    found = []
    for name, hint in get_type_hints(TrainingArguments).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
        if kinds and name != "optim":
            found.append((name, [str(entry.value) for entry in kinds[0]]))
    return tuple(found)
