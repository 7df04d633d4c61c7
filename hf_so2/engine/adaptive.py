"""Levenberg-Marquardt damping: how well the quadratic model predicted a step decides on the damping of the next.

Martens & Grosse 2015 (arXiv 1503.05671, section 6.5): the ratio of the actual to the predicted change of the loss on
the same batch is near 1 where the model can be trusted, and then damping falls; it is small where a step went further
than the model holds, and then damping rises. Both changes are measured across the second-order updates alone, before
the fallback moves embeddings, head, norms and biases, of which the model knows nothing.
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

# The paper's thresholds, and its ω per step; it suggests to look every five steps.
POOR, GOOD, DECAY = 0.25, 0.75, 19 / 20

# Further out, damping either dominates every factor or is round-off.
LEAST, MOST = 1e-6, 1e6

Loss = Callable[[], Tensor | float]


def predicted_change(updates: Sequence[LayerUpdate]) -> float:
    """`Σ <G, Δ> + ½ <Δ, F Δ>` over the layers, Δ being what is about to be added: momentum, clip and decay included.

    Each rank does this for the layers that it owns; the sum is the same on all.
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
    """Moves `curvature.damping_factor`, which multiplies the strength of every layer's damping.

    Args:
        curvature: the layers.

    Attributes:
        losses: the loss of every micro-batch of the coming step, to be called with the parameters as they stand.
        ratio: actual over predicted change at the last measurement; not a number before the first.

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
        """Apply the updates, with the loss taken on either side, and set the damping of each layer's next refresh."""
        predicted = predicted_change(updates)
        before = self._loss()
        for update in updates:
            update.apply()
        actual = self._loss() - before
        if predicted == 0:  # a step of length zero, as at the start of a warm-up, says nothing
            return
        # A model that expects its own step to be of no use says the same as a ratio below zero.
        self.ratio = actual / predicted if predicted < 0 else -math.inf
        waited = step - self.curvature.adapted_at
        self.curvature.adapted_at = step
        if self.ratio > GOOD:
            self._scale(DECAY**waited)
        elif not self.ratio >= POOR:  # not a number after an overflow
            self._scale(DECAY**-waited)

    def require_losses(self) -> None:
        """See to it before anything moves that the step can be measured.

        Raises:
            ConfigurationError: no loss was given for this step.
        """
        if not self.losses:
            raise ConfigurationError(
                "adaptive_damping", True, "needs `optimizer.reevaluate_with(loss)` before every step that `wants_loss`"
            )

    def telemetry(self) -> dict[str, float]:
        """The factor as it stands, and the ratio that was measured last, for the log."""
        measured = {"curvature/reduction_ratio": self.ratio} if math.isfinite(self.ratio) else {}
        return {"curvature/damping_factor": self.curvature.damping_factor, **measured}

    def _scale(self, by: float) -> None:
        self.curvature.damping_factor = min(max(self.curvature.damping_factor * by, LEAST), MOST)

    def _loss(self) -> float:
        """Of the whole step: summed over micro-batches, averaged over ranks, and so the same number on each."""
        mine = sum(float(loss()) for loss in self.losses)
        _, ranks = world()
        if ranks == 1:
            return mine
        total = torch.tensor(mine, dtype=torch.float64, device=next(iter(self.curvature.layers.values())).device)
        sum_over_ranks([total])
        return float(total) / ranks
