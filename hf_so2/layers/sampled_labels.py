"""Labels drawn from a model's own predictions, for the Fisher matrix itself (Martens 2020, arXiv 1412.1193, section 5).

The draws have their own generator. Dropout and data thus see the same random numbers as without the draws, and a
resumed run draws the same labels as an uninterrupted one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def generator_for(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """A generator whose random numbers depend on seed, step and rank only. One serves all micro-batches of a step."""
    (word,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(word >> np.uint64(1)))


def sampled_loss(
    logits: Tensor, counted: Tensor | None, generator: torch.Generator, *, independent: bool = False
) -> Tensor:
    """The sum over counted positions of the cross-entropy with labels drawn from the predictions.

    Args:
        logits: (..., classes), of any floating-point dtype.
        counted: (...), true where a position has a loss; None if all have one. Labels are also drawn at the other
            positions, so that a draw does not depend on the mask elsewhere.
        generator: a generator on the device of `logits`.
        independent: whether every class has its own yes or no, as in multi-label classification. Labels are then drawn
            from `sigmoid(logits)`, and a row's loss is the mean over classes. Otherwise one class is drawn from
            `softmax(logits)`.

    Returns:
        The loss in float32 (float64 for float64 logits), 0-dim.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if independent:
        answers = torch.bernoulli(rows.detach().sigmoid(), generator=generator)
        losses = functional.binary_cross_entropy_with_logits(rows, answers, reduction="none").mean(dim=1)
    else:
        labels = torch.multinomial(rows.detach().softmax(dim=1), 1, generator=generator).squeeze(1)
        losses = functional.cross_entropy(rows, labels, reduction="none")
    return losses.sum() if counted is None else losses[counted.reshape(-1)].sum()
