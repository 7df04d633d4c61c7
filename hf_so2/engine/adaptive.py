"""Levenberg-Marquardt damping: how well the quadratic model predicts one step sets the damping of the next.

Martens & Grosse 2015 (arXiv 1503.05671, section 6.5) take the ratio of the actual to the predicted change of the loss
on the same batch. A ratio near 1 means that the model can be trusted, and damping falls. A small ratio means that the
step went further than the model holds, and damping rises. Both changes are those of the second-order updates alone.
They are measured before the fallback moves embeddings, head, norms and biases, which the model does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_so2.distributed import sum_over_ranks, world
from hf_so2.engine.preconditioned import LayerUpdate
from hf_so2.engine.statistics import Curvature
from hf_so2.errors import ConfigurationError

# The paper's thresholds, and its ω per step. The paper suggests to measure every five steps.
POOR, GOOD, DECAY = 0.25, 0.75, 19 / 20

# Limits of the factor. Beyond them, damping either dominates every factor or is lost to round-off.
LEAST, MOST = 1e-6, 1e6

Loss = Callable[[], Tensor | float]


def predicted_change(updates: Sequence[LayerUpdate]) -> float:
    """`Σ <G, Δ> + ½ <Δ, F Δ>` over the layers. Δ is the change to be applied, with momentum, clip and decay.

    Each rank computes the terms of the layers that it owns. The sum is the same on all ranks.
    """
    terms = updates[0].gradient.new_zeros(len(updates), dtype=torch.float64)
    for index, u in enumerate(updates):
        if u.layer.owned:
            change = u.change()
            bends = u.layer.block.curvature_along(u.layer.state, change)
            assert bends is not None
            terms[index] = (u.gradient * change).sum() + bends / 2
    sum_over_ranks([terms])
    return float(terms.sum())


class AdaptiveDamping:
    """Adapts `curvature.damping_factor`, which multiplies the strength of every layer's damping.

    Args:
        curvature: the layers.

    Attributes:
        losses: for every micro-batch of the coming step, a function that returns its loss at the current parameters.
        ratio: actual over predicted change at the last measurement; NaN before the first.

    Raises:
        ConfigurationError: a layer's block does not model the loss.
    """

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature
        self.losses: list[Loss] = []
        self.ratio = math.nan
        for layer in curvature.layers.values():
            if not layer.block.models_the_loss:
                allowed = f"needs both factors of K-FAC's kind of every weight, and {layer.name} has not"
                raise ConfigurationError("adaptive_damping", True, allowed)

    def apply(self, updates: Sequence[LayerUpdate], step: int) -> None:
        """Apply the updates, measure the loss before and after, and set the damping of each layer's next refresh."""
        predicted = predicted_change(updates)
        before = self._loss()
        for update in updates:
            update.apply()
        actual = self._loss() - before
        if predicted == 0:  # a step of length zero, as at the start of a warm-up, says nothing
            return
        # If the model predicts that its own step does not lower the loss, this counts as a ratio below zero.
        self.ratio = actual / predicted if predicted < 0 else -math.inf
        waited = step - self.curvature.adapted_at
        self.curvature.adapted_at = step
        if self.ratio > GOOD:
            self._scale(DECAY**waited)
        elif not self.ratio >= POOR:  # not a number after an overflow
            self._scale(DECAY**-waited)

    def require_losses(self) -> None:
        """Check that the step can be measured, before any parameter moves.

        Raises:
            ConfigurationError: no loss was given for this step.
        """
        if not self.losses:
            raise ConfigurationError(
                "adaptive_damping", True, "needs `optimizer.reevaluate_with(loss)` before every step that `wants_loss`"
            )

    def telemetry(self) -> dict[str, float]:
        """The current factor and the last measured ratio, for the log."""
        measured = {"curvature/reduction_ratio": self.ratio} if math.isfinite(self.ratio) else {}
        return {"curvature/damping_factor": self.curvature.damping_factor, **measured}

    def _scale(self, by: float) -> None:
        self.curvature.damping_factor = min(max(self.curvature.damping_factor * by, LEAST), MOST)

    def _loss(self) -> float:
        """The loss of the whole step: the sum over micro-batches, averaged over ranks. It is the same on all ranks."""
        mine = sum(float(loss()) for loss in self.losses)
        _, ranks = world()
        if ranks == 1:
            return mine
        total = torch.tensor(mine, dtype=torch.float64, device=next(iter(self.curvature.layers.values())).device)
        sum_over_ranks([total])
        return float(total) / ranks
