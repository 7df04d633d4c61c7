"""The exceptions a user of hf_so2 can meet."""

from __future__ import annotations

_LONGEST = 400  # characters of a value in a message


class ConfigurationError(ValueError):
    """A setting, file or model that cannot be used as given.

    The message is one sentence that names the field, the value and what is allowed; command-line scripts print it and
    exit with code 2.

    Args:
        field: the setting, flag or argument at fault, as the user wrote it.
        value: what it was given.
        allowed: what it may be, or what to do instead.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}={_one_line(value)}: {allowed}")

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.allowed)


def _one_line(value: object) -> str:
    """Some values, models among them, are written over many lines."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class TrainingDivergedError(RuntimeError):
    """Training cannot go on: too many steps in a row had a non-finite gradient, or a factor cannot be decomposed."""


class BrokenStepError(RuntimeError):
    """A step ended half-way, so that weights and state are of two steps: loading a state is the only way on.

    Args:
        step: its number.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(
            f"step {step} was broken off when some weights had moved and others had not: load a checkpoint, of"
            " the model and of the optimizer, to go on"
        )

    def __reduce__(self) -> tuple[type[BrokenStepError], tuple[int]]:
        return type(self), (self.step,)
