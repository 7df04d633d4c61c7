"""From the tensors that a module takes in and gets back to the rows of its statistics: weight sharing and padding.

A layer of a language model is used at every position of a sequence. `expand` counts every position as an example of its
own, right for a loss that is a sum over tokens; `reduce` makes one example of a sequence, the mean of its inputs with
the sum of its output gradients (Eschenhagen et al. 2023, arXiv 2311.00636, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.layers.adapters import Adapter


@dataclass(frozen=True)
class InputRows:
    """The input rows of one call of a layer.

    Args:
        h: (rows, fan_in) and floating point, or the indices (rows,) of one-hot inputs, -1 where one is left out.
        kept: which positions count, (positions,) of booleans; None where all do.
        count: how many rows are not padding.
        positions: how many positions those came from; the same number unless positions were reduced.
    """

    h: Tensor
    kept: Tensor | None
    count: int | Tensor
    positions: int | Tensor


@dataclass(frozen=True)
class WeightSharing:
    """One way to make rows of positions.

    Args:
        inputs: the rows of a layer's inputs, (..., fan_in) or indices of any shape, given a mask that is non-zero where
            a position is no padding; a mask that has not one entry per position is ignored.
        gradients: `δ` (rows, fan_out) of its output gradients (..., fan_out), given the rows of its inputs.
    """

    inputs: Callable[[Adapter, Tensor, Tensor | None], InputRows]
    gradients: Callable[[Adapter, Tensor, InputRows], Tensor]


def _expanded_inputs(adapter: Adapter, inputs: Tensor, mask: Tensor | None) -> InputRows:
    """Every position is a row; padded ones are zero."""
    h = inputs.reshape(-1) if adapter.one_hot else _with_ones(adapter, inputs.reshape(-1, inputs.shape[-1]))
    kept = _kept(adapter, inputs, mask, len(h))
    if kept is None:
        return InputRows(h, None, len(h), len(h))
    h = h.masked_fill(~kept, -1) if adapter.one_hot else h * kept.unsqueeze(1)
    return InputRows(h, kept, kept.sum(), kept.sum())


def _expanded_gradients(adapter: Adapter, gradients: Tensor, rows: InputRows) -> Tensor:
    delta = gradients.reshape(-1, gradients.shape[-1])
    return delta if rows.kept is None else delta * rows.kept.unsqueeze(1)


def _are_sequences(adapter: Adapter, tensor: Tensor) -> bool:
    """Whether there is a dimension of positions to reduce: a classifier and an expert's selection of tokens have none,
    and an embedding's mean of one-hot inputs would no longer be diagonal. These are expanded.
    """
    return tensor.ndim > 2 and not adapter.one_hot


def _reduced_inputs(adapter: Adapter, inputs: Tensor, mask: Tensor | None) -> InputRows:
    """Every sequence is a row, the mean over its positions; padded ones are left out."""
    if not _are_sequences(adapter, inputs):
        return _expanded_inputs(adapter, inputs, mask)
    h = _with_ones(adapter, inputs.flatten(1, -2))
    positions = h.shape[0] * h.shape[1]
    kept = _kept(adapter, inputs, mask, positions)
    if kept is None:
        return InputRows(h.mean(dim=1), None, len(h), positions)
    weights = kept.reshape(h.shape[:2]).to(h.dtype).unsqueeze(2)
    lengths = weights.sum(dim=1)
    means = (h * weights).sum(dim=1) / lengths.clamp(min=1)
    return InputRows(means, kept, (lengths > 0).sum(), kept.sum())


def _reduced_gradients(adapter: Adapter, gradients: Tensor, rows: InputRows) -> Tensor:
    if not _are_sequences(adapter, gradients):
        return _expanded_gradients(adapter, gradients, rows)
    delta = gradients.flatten(1, -2)
    return (delta if rows.kept is None else delta * rows.kept.reshape(delta.shape[:2]).unsqueeze(2)).sum(dim=1)


WEIGHT_SHARING = {
    "expand": WeightSharing(_expanded_inputs, _expanded_gradients),
    "reduce": WeightSharing(_reduced_inputs, _reduced_gradients),
}


def _kept(adapter: Adapter, inputs: Tensor, mask: Tensor | None, positions: int) -> Tensor | None:
    """Which positions count, (positions,) of booleans; None where all do."""
    # Experts see a selection of the tokens, which no mask of the whole batch describes.
    kept = mask.reshape(-1) != 0 if mask is not None and mask.numel() == positions else None
    if adapter.ignored_index is None:
        return kept
    has_gradient = inputs.reshape(-1) != adapter.ignored_index
    return has_gradient if kept is None else kept & has_gradient


def _with_ones(adapter: Adapter, h: Tensor) -> Tensor:
    return torch.cat([h, torch.ones_like(h[..., :1])], dim=-1) if adapter.has_bias else h
