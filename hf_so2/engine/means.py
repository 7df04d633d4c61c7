"""From sums over the rows that each rank has captured to means over the global step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_so2.curvature import State
from hf_so2.distributed import sum_over_ranks
from hf_so2.layers.sums import Captured, LayerSums
from hf_so2.parallel.sharing import Sharing
from hf_so2.weights.ends import End


def means(ends: Mapping[str, End], captured: Captured, sharing: Sharing) -> dict[str, State]:
    """Means over the global step, for every layer that saw a row on any rank; of a tied one, for each such end.

    A loss that is a mean over N rows hands out `δ/N`. N is how many predictions the loss came back through, or, of a
    model that shows none, how many positions of the layer. Whoever announces gradients names that factor, and the
    capture has undone it already.

    Args:
        ends: those that are captured at this step; the same ones in the same order on every rank.
        captured: what this rank has seen of them.
        sharing: who holds which layer.
    """
    taken = {name: captured.layers.get(name) or LayerSums() for name in ends}
    counts = _counted(ends, taken, captured.tokens)
    seen = {name: end for name, end in ends.items() if counts[name][0]}
    sums = {name: _shares(end, taken[name], captured, *counts[name]) for name, end in seen.items()}
    sharing.sum_statistics((end.layer, end.block.statistics, sums[name]) for name, end in seen.items())
    found: dict[str, State] = {end.layer.name: {} for end in seen.values()}
    for name, end in seen.items():
        if end.layer.held:
            found[end.layer.name].update({end.prefix + key: value for key, value in sums[name].items()})
    return found


def _shares(end: End, seen: LayerSums, captured: Captured, rows: int, count: int) -> State:
    """What this rank adds to the means over all ranks, made of its sums in place; zeros where it has seen nothing.

    Args:
        rows: that the end has seen on all ranks.
        count: of tokens that its loss was the mean of, on all ranks.
    """
    if not seen.sums:
        return end.no_rows()
    divisors = {"rows": rows, "tokens": max(count, 1)}
    for key, statistic in end.block.statistics.items():
        own = seen.positions if captured.tokens is None else captured.tokens
        undone = 1 if captured.is_scaled else own**statistic.gradient_degree
        undone = undone.double() if isinstance(undone, Tensor) else undone  # what are counts would become float32
        seen.sums[key].mul_(undone / divisors[statistic.per])
    return seen.sums


def _counted(
    ends: Mapping[str, End], taken: Mapping[str, LayerSums], tokens: int | Tensor | None
) -> dict[str, tuple[int, int]]:
    """Rows of each layer and tokens of its loss, over all ranks; one transfer to the host."""
    if not ends:
        return {}
    device = next(iter(ends.values())).layer.device
    mine = [(seen.rows, seen.positions if tokens is None else tokens) for seen in taken.values()]
    counts = torch.stack([torch.as_tensor(n, device=device, dtype=torch.int64) for pair in mine for n in pair])
    sum_over_ranks([counts])
    rows_and_tokens = counts.view(-1, 2).tolist()
    return {name: (rows, count) for name, (rows, count) in zip(taken, rows_and_tokens, strict=True)}
