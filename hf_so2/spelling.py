"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OTHER_NAMES = {
    "lr": "learning_rate",
    "optimizer": "optim",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "model": "model_name_or_path",
    "resume": "resume_from_checkpoint",
}
"""What other programs call our flags, too far from them in letters."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the known name closest to ``name``; empty where none is close."""
    by_lower = {entry.lower(): entry for entry in sorted(known)}
    other = OTHER_NAMES.get(name.lower())
    matches = [other] if other in by_lower else difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[matches[0]]!r}?)" if matches else ""
