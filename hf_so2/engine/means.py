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
    """Means over the global step, for every layer that saw a row on any rank. A tied layer has means for each such end.

    If the loss is a mean over N rows, the backward pass gives `δ/N` for each row. N is the number of predictions that
    the gradient of the loss passed through, or, if the model shows no predictions, the number of the layer's positions.
    A caller that announces gradients states the factor itself, and the capture has already undone it.

    Args:
        ends: the ends captured at this step, the same ones in the same order on every rank.
        captured: what this rank has captured.
        sharing: which ranks hold which layer.
    """
    taken = {name: captured.layers.get(name) or LayerSums() for name in ends}
    counts = _counted(ends, taken, captured.tokens)
    seen = {name: end for name, end in ends.items() if counts[name][0]}
    for name, end in seen.items():
        end.layer.rows = counts[name][0]
    sums = {name: _shares(end, taken[name], captured, *counts[name]) for name, end in seen.items()}
    sharing.sum_statistics((end.layer, end.block.statistics, sums[name]) for name, end in seen.items())
    found: dict[str, State] = {end.layer.name: {} for end in seen.values()}
    for name, end in seen.items():
        if end.layer.held:
            found[end.layer.name].update({end.prefix + key: value for key, value in sums[name].items()})
    return found


def _shares(end: End, seen: LayerSums, captured: Captured, rows: int, count: int) -> State:
    """This rank's share of the means over all ranks, computed from its sums in place; zeros if it has seen nothing.

    Args:
        end: the end.
        seen: this rank's sums.
        captured: what this rank has captured.
        rows: number of rows that the end has seen, over all ranks.
        count: number of tokens that the loss is a mean of, over all ranks.
    """
    if not seen.sums:
        return end.no_rows()
    divisors = {"rows": rows, "tokens": max(count, 1)}
    for key, statistic in end.block.statistics.items():
        own = seen.positions if captured.tokens is None else captured.tokens
        undone = 1 if captured.is_scaled else own**statistic.gradient_degree
        undone = undone.double() if isinstance(undone, Tensor) else undone  # counts would become float32
        seen.sums[key].mul_(undone / divisors[statistic.per])
    return seen.sums


def _counted(
    ends: Mapping[str, End], taken: Mapping[str, LayerSums], tokens: int | Tensor | None
) -> dict[str, tuple[int, int]]:
    """By end: number of rows and number of tokens of the loss, over all ranks. One transfer to the host."""
    if not ends:
        return {}
    device = next(iter(ends.values())).layer.device
    mine = [(seen.rows, seen.positions if tokens is None else tokens) for seen in taken.values()]
    counts = torch.stack([torch.as_tensor(n, device=device, dtype=torch.int64) for pair in mine for n in pair])
    sum_over_ranks([counts])
    rows_and_tokens = counts.view(-1, 2).tolist()
    return {name: (rows, count) for name, (rows, count) in zip(taken, rows_and_tokens, strict=True)}
