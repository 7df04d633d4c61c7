"""When statistics are taken and preconditioners rebuilt: a pure function of the step number."""

from __future__ import annotations

# The first statistics are the noisiest and the loss moves fastest: a preconditioner kept from step 1 until the first
# regular refresh costs more loss than these refreshes cost time.
EARLY_STEPS = frozenset({1, 2, 4, 7})


def due(step: int, every: int) -> bool:
    """Whether work done every `every` steps is due at step number `step`, counted from 1."""
    return step in EARLY_STEPS or step % every == 0
