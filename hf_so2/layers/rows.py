"""From a module's inputs and output gradients to the rows of its statistics.

A position counts if and only if the loss depends on it: its output gradient is not exactly zero in every layer that
reads the same tensor. Padding, positions without a label, the other side of an encoder-decoder and an expert's empty
slots all have a gradient of exactly zero. The layers thus need no mask. Layers that read one tensor decide together,
because one of them may get round-off in place of zeros. An example is the first position of a causal attention, which
can attend only to itself. Its query gets a gradient of 0 from one kernel and of 1e-20 from another. Its value gets a
gradient from all kernels.

A layer of a language model is used at every position of a sequence. `expand` counts every position as an example, which
is right for a loss that is a sum over tokens. `reduce` makes one example of a sequence: the mean of its inputs with the
sum of its output gradients (Eschenhagen et al. 2023, arXiv 2311.00636, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.layers.adapters import Adapter


@dataclass(frozen=True)
class InputRows:
    """The input rows of one call of a layer.

    Args:
        h: (rows, fan_in) and floating point, or the indices (rows,) of one-hot inputs. A row that does not count is
            zero or finite, or has index -1.
        count: number of rows that count.
        positions: number of positions that these rows come from. It equals `count` unless positions were reduced.
        live: which rows count, (rows,) of booleans.
        kept: which positions count, (positions,) of booleans, if others may have a gradient; else None.
        weights: which rows count, as numbers (rows, 1); None if all others have `h` = 0.
    """

    h: Tensor
    count: int | Tensor
    positions: int | Tensor
    live: Tensor
    kept: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class WeightSharing:
    """One way to make rows from positions.

    Args:
        inputs: a function to the rows of a layer's inputs. It takes the inputs, (..., fan_in) or indices of any shape,
            the dtype of the statistics, and which positions count, (positions,) of booleans.
        gradients: a function from output gradients (..., fan_out) and the rows of the inputs to `δ` (rows, fan_out).
    """

    inputs: Callable[[Adapter, Tensor, torch.dtype, Tensor], InputRows]
    gradients: Callable[[Adapter, Tensor, InputRows], Tensor]


# So many entries of a row of gradients are looked at first.
PROBED = 8


def live_rows(gradients: Sequence[Tensor]) -> Tensor:
    """Which positions have an output gradient that is not zero, (positions,) of booleans.

    Args:
        gradients: gradients (..., fan_out) of layers that read the same tensor; at least one.
    """
    tables = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
    if tables[0].device.type != "cpu":
        return _squares_are_there(tables)
    # Nearly always a few entries tell, which are fifty times as quick to look at. To pick rows means to wait elsewhere.
    live = _squares_are_there([table[:, :PROBED] for table in tables])
    open_rows = (~live).nonzero().squeeze(1)
    live[open_rows] = _squares_are_there([table[open_rows] for table in tables])
    return live


def _squares_are_there(tables: Sequence[Tensor]) -> Tensor:
    # If the entries are so small that their squares are zero, the outer product is zero too.
    live = torch.linalg.vector_norm(tables[0], dim=1) != 0
    for more in tables[1:]:
        live |= torch.linalg.vector_norm(more, dim=1) != 0
    return live


def _expanded_inputs(adapter: Adapter, inputs: Tensor, dtype: torch.dtype, live: Tensor) -> InputRows:
    """Every position is a row."""
    count = live.sum()
    if adapter.one_hot:
        ids = inputs.reshape(-1)
        if adapter.ignored_index is None:
            return InputRows(torch.where(live, ids, -1), count, count, live)
        # The row of this index gets no gradient, but its positions do.
        kept = live & (ids != adapter.ignored_index)
        count = kept.sum()
        return InputRows(torch.where(kept, ids, -1), count, count, kept, kept)
    h = _with_ones(adapter, inputs.reshape(-1, inputs.shape[-1]).to(dtype))
    h, weights = _without_dead_rows(h, live, inputs)
    return InputRows(h, count, count, live, weights=weights)


def _expanded_gradients(adapter: Adapter, gradients: Tensor, rows: InputRows) -> Tensor:
    delta = gradients.reshape(-1, gradients.shape[-1])
    return delta if rows.kept is None else delta * rows.kept.unsqueeze(1)


def _without_dead_rows(h: Tensor, live: Tensor, given: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keep what does not count out of sums over the rows `h` (rows, n). It may be anything, also infinite.

    Args:
        h: the rows.
        live: which rows count.
        given: the tensor that must not be written to.

    Returns:
        Rows, and their weights (rows, 1) of ones and zeros; None if the rows that do not count are zero. On a CPU to
        set them to zero can take a copy of all rows. If they are finite, weights take its place.
    """
    if h.device.type != "cpu":
        return torch.where(live.unsqueeze(1), h, 0), None  # without a wait for the device
    dead = live.logical_not().nonzero().squeeze(1)
    if not len(dead):
        return h, None
    is_own = h.data_ptr() != given.data_ptr()
    if not is_own and bool(torch.isfinite(h[dead].square().sum())):
        return h, live.unsqueeze(1).to(h.dtype)
    own = h if is_own else h.clone()
    return own.index_fill_(0, dead, 0), None


def _are_sequences(adapter: Adapter, tensor: Tensor) -> bool:
    """Whether there is a dimension of positions to reduce; otherwise they are expanded.

    A classifier and an expert's selection of tokens have no such dimension. An embedding is not reduced either: for the
    mean of one-hot inputs, `A` would no longer be diagonal.
    """
    return tensor.ndim > 2 and not adapter.one_hot


def _reduced_inputs(adapter: Adapter, inputs: Tensor, dtype: torch.dtype, live: Tensor) -> InputRows:
    """Every sequence is a row, the mean over its positions that count."""
    if not _are_sequences(adapter, inputs):
        return _expanded_inputs(adapter, inputs, dtype, live)
    h, weights = _without_dead_rows(_with_ones(adapter, inputs.flatten(0, -2).to(dtype)), live, inputs)
    h = h if weights is None else h * weights
    lengths = live.reshape(len(inputs), -1).sum(dim=1)
    sums = h.reshape(len(inputs), -1, h.shape[-1]).sum(dim=1)
    means, are_live = sums / lengths.clamp(min=1).unsqueeze(1), lengths > 0
    return InputRows(means, are_live.sum(), live.sum(), are_live)


def _reduced_gradients(adapter: Adapter, gradients: Tensor, rows: InputRows) -> Tensor:
    if not _are_sequences(adapter, gradients):
        return _expanded_gradients(adapter, gradients, rows)
    return gradients.flatten(1, -2).sum(dim=1)


WEIGHT_SHARING = {
    "expand": WeightSharing(_expanded_inputs, _expanded_gradients),
    "reduce": WeightSharing(_reduced_inputs, _reduced_gradients),
}


def _with_ones(adapter: Adapter, h: Tensor) -> Tensor:
    return torch.cat([h, torch.ones_like(h[..., :1])], dim=-1) if adapter.has_bias else h
