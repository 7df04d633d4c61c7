"""The exceptions a user of hf_so2 can meet."""

from __future__ import annotations


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
        super().__init__(f"{field}={value!r}: {allowed}")

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.allowed)


class TrainingDivergedError(RuntimeError):
    """Training cannot go on: too many steps in a row had a non-finite gradient, or a factor cannot be decomposed."""
