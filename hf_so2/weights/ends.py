"""The ends of a preconditioned weight: what uses it, with statistics of its own. Most have one, a tied weight two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hf_so2.curvature import State, Tied, TokenBlock
from hf_so2.curvature.tied import EMBEDDING, HEAD, of_end
from hf_so2.layers import Adapter
from hf_so2.layers.adapters import LINEAR
from hf_so2.layers.sketch import Fold
from hf_so2.weights.layer import Layer, statistics_dtype


@dataclass(frozen=True)
class End:
    """Modules that use a weight in the same way.

    Args:
        layer: the weight.
        block: what observes the tokens of these modules.
        modules: theirs are the calls that are captured.
        adapter: how they store the weight, and what they take in.
        prefix: how the names of this end's statistics begin in the layer's state.
    """

    layer: Layer
    block: TokenBlock
    modules: Sequence[nn.Module]
    adapter: Adapter
    prefix: str = ""

    @property
    def name(self) -> str:
        """The weight's, and which end of it; no other end of the model has the same."""
        return f"{self.layer.name} as {self.prefix.rstrip('_')}" if self.prefix else self.layer.name

    @property
    def gradient_degrees(self) -> dict[str, int]:
        """How often `δ` enters each statistic as a factor."""
        return {name: statistic.gradient_degree for name, statistic in self.block.statistics.items()}

    @property
    def sums_of_outer_products(self) -> list[str]:
        """The statistics that are, wherever they are matrices."""
        return [name for name, statistic in self.block.statistics.items() if statistic.symmetric]

    def statistics_dtype(self) -> torch.dtype:
        """Of the statistics that are taken now: the weight may have been cast."""
        weight = self.modules[0].weight
        assert isinstance(weight, Tensor)
        return statistics_dtype(weight.dtype)

    def observe(self, inputs: Tensor, gradients: Tensor, known: State, fold: Fold | None) -> State:
        """The sums of the block's statistics over rows, see `TokenBlock.observe`."""
        self.layer.follow(gradients.device, gradients.dtype)
        return self.block.observe(of_end(self.layer.state, self.prefix), inputs, gradients, known, fold)

    def no_rows(self) -> State:
        """The sums over nothing."""
        state, device = self.layer.state, self.layer.device
        return {name: torch.zeros_like(state[self.prefix + name], device=device) for name in self.block.statistics}


def ends_of(layer: Layer) -> list[End]:
    """The ends of a layer of the K-FAC family."""
    if isinstance(layer.block, Tied):
        uses = {EMBEDDING: (layer.modules, layer.adapter), HEAD: (layer.head, LINEAR)}
        return [End(layer, block, *uses[prefix], prefix) for prefix, block in layer.block.ends.items()]
    return [End(layer, cast(TokenBlock, layer.block), layer.modules, layer.adapter)]
