"""How many of a layer's rows its statistics are computed from.

A factor of n dimensions is known well enough from a few n rows, over the steps that its running average covers. More
rows cost time and add little. The number is chosen from the rows of the whole last step, over all micro-batches and
ranks. So it depends neither on the split of a batch nor on the number of processes. At the first step every row is
used.

Factors are computed from signed sums over the tokens of a sequence. The outer products of all tokens are the largest
cost of the K-FAC family. A count sketch computes only a fraction of them. It distributes tokens over groups and adds up
each group's rows with random signs `s`. The product `(Σ s_i x_i) (Σ s_j x_j)ᵀ` contains every token's own `x_i x_iᵀ`,
and the products of different tokens have mean zero (Clarkson & Woodruff 2013, arXiv 1207.6365, section 2). A sample of
the tokens could miss tokens whose gradients are much larger than the others'. A sketch misses none.

EKFAC's second moments are no sums of outer products. They are taken from a sample, one in so many tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Fold = Callable[[Tensor, Tensor | None], Tensor]

# About so many rows of a step are kept: this multiple of the dimension, and this number at least.
ROWS_PER_DIMENSION, LEAST_ROWS = 0.25, 256

# About so many rows of a step are sampled for second moments, which have no directions to resolve.
SAMPLED_ROWS = 128

# So many features of a sequence's inputs decide where its sample begins. The multiplier mixes their digits (Knuth 1998,
# The Art of Computer Programming 3, section 6.4).
MARKS, HASH = 4, 2654435761


@dataclass(frozen=True)
class RowPlan:
    """How the rows of one call of a layer enter its statistics.

    Args:
        live: which rows count, (rows,) of booleans.
        weights: the same as numbers (rows, 1); None if the inputs of all other rows are zero.
        inputs: the inputs of the rows, (rows, fan_in); None if they are one-hot, which are never sampled.
        shape: shape of the positions, (..., length), if every position is a row; else None, and nothing is folded.
        sketch: number of tokens of a sequence that are folded into one; None for as many as the factor allows.
        seen: number of rows of the whole last step; 0 if there was none.
        step: number of the step. Every step folds and samples in another way.
    """

    live: Tensor
    weights: Tensor | None = None
    inputs: Tensor | None = None
    shape: torch.Size | None = None
    sketch: int | None = 1
    seen: int = 0
    step: int = 0

    def fold(self, dimension: int) -> Fold | None:
        """The function that folds rows for a factor of this dimension, see `fold_of_sequences`; None for all."""
        size = thinning(self.seen, dimension) if self.sketch is None else self.sketch
        if self.shape is None or size < 2:
            return None
        return fold_of_sequences(self.shape, size, self.step, self.live.device)

    def sample(self) -> tuple[Tensor, float] | None:
        """One in so many positions of each sequence; None for all.

        Where a sequence begins depends on its own inputs. So sequences begin at different places, and neither the split
        of a batch nor the number of processes matters. In as many steps as rows are left out, every row has its turn.

        Returns:
            The indices of the rows (picked,), and the number of rows that each stands for.
        """
        if self.shape is None or self.inputs is None or len(self.shape) < 2:
            return None
        length = self.shape[-1]
        stride = min(thinning(self.seen, least=SAMPLED_ROWS), length)
        if stride < 2:
            return None
        offsets = (self._mark(length) + self.step) % stride
        places = offsets.unsqueeze(1) + torch.arange(0, length, stride, device=offsets.device)
        indices = places + torch.arange(len(places), device=offsets.device).unsqueeze(1) * length
        # If the stride divides the length, all places are inside, and nothing waits for the device.
        return (indices.flatten() if length % stride == 0 else indices[places < length]), float(stride)

    def _mark(self, length: int) -> Tensor:
        """A number for each sequence, (sequences,), that its inputs decide, but not their last digits."""
        assert self.inputs is not None
        features = torch.where(self.live.unsqueeze(1), self.inputs[:, :MARKS], 0)
        # Alternating signs: what all tokens have in common would give all sequences one mark.
        signs = 1 - 2 * (torch.arange(length, device=features.device) % 2)
        sums = (features.reshape(-1, length, features.shape[1]) * signs[:, None]).sum(dim=1)
        # The first four binary digits of each sum.
        digits = (torch.frexp(sums).mantissa.abs() * 32).long() % 16
        number = (digits * 16 ** torch.arange(digits.shape[1], device=digits.device)).sum(dim=1)
        return (number * HASH) >> 16


def thinning(rows: int, dimension: int = 0, least: int = LEAST_ROWS) -> int:
    """By which whole number so many rows can be divided, so that enough are left for a factor of this dimension."""
    return max(1, round(rows / max(least, ROWS_PER_DIMENSION * dimension)))


@lru_cache(maxsize=32)
def fold_of_sequences(shape: torch.Size, size: int, seed: int, device: torch.device) -> Fold | None:
    """The function that folds the rows of some sequences.

    Args:
        shape: shape of the positions, (..., length).
        size: the largest number of tokens in a group. The tokens of a group are as far apart as possible.
        seed: seed of the signs. They depend only on the seed and the position in a sequence, not on the split of a
            batch or the number of processes.
        device: device of the rows.

    Returns:
        A function from rows (positions, n), and a weight for each (positions, 1) or None, to (groups, n). None if there
        is nothing to fold: the positions do not form sequences, or a group would have one token.
    """
    if len(shape) < 2 or min(size, shape[-1]) < 2:
        return None
    length = shape[-1]
    groups = -(-length // size)
    # Row g of this table is group g. Positions beyond the end are left out.
    table = torch.arange(-(-length // groups) * groups).reshape(-1, groups).mT
    inside = table < length
    members, sizes = table[inside], inside.sum(dim=1)
    signs = 2 * torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(seed)) - 1
    sequences = torch.arange(0, shape.numel(), length).unsqueeze(1)
    starts = (sequences + (sizes.cumsum(dim=0) - sizes)).reshape(-1).to(device)
    signs = signs[members].repeat(len(sequences)).to(device)
    members = (sequences + members).reshape(-1).to(device)

    def fold(rows: Tensor, weights: Tensor | None) -> Tensor:
        signed = signs.to(rows.dtype)
        if weights is not None:
            signed = signed * weights.squeeze(1)[members]
        return embedding_bag(members, rows, starts, mode="sum", per_sample_weights=signed)

    return fold
