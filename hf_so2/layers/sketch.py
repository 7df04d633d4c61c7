"""Fewer rows with the same sum of outer products on average: signed sums over the tokens of a sequence.

The outer products of all tokens are the largest cost of the K-FAC family. A count sketch computes only a fraction of
them. It distributes tokens over groups and adds up each group's rows with random signs `s`. The product
`(Σ s_i x_i) (Σ s_j x_j)ᵀ` contains every token's own `x_i x_iᵀ`, and the products of different tokens have mean zero
(Clarkson & Woodruff 2013, arXiv 1207.6365, section 2). A sample of the tokens could miss tokens whose gradients are
much larger than the others'. A sketch misses none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Fold = Callable[[Tensor, Tensor | None], Tensor]


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
