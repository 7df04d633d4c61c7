"""The ends of a preconditioned weight. An end is a use of the weight with its own statistics.

Most weights have one end. A tied weight has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hf_so2.curvature import State, Tied, TokenBlock
from hf_so2.curvature.parts.tied import EMBEDDING, HEAD, of_end
from hf_so2.layers import Adapter
from hf_so2.layers.adapters import LINEAR
from hf_so2.layers.plan import RowPlan
from hf_so2.weights.layer import Layer, statistics_dtype


@dataclass(frozen=True)
class End:
    """Modules that use a weight in the same way.

    Args:
        layer: the weight.
        block: the block that observes the tokens of these modules.
        modules: the modules whose calls are captured.
        adapter: how these modules store the weight, and what inputs they take.
        prefix: prefix of the names of this end's statistics in the layer's state.
    """

    layer: Layer
    block: TokenBlock
    modules: Sequence[nn.Module]
    adapter: Adapter
    prefix: str = ""

    @property
    def name(self) -> str:
        """The weight's name and the end's. It is unique in the model."""
        return f"{self.layer.name} as {self.prefix.rstrip('_')}" if self.prefix else self.layer.name

    @property
    def gradient_degrees(self) -> dict[str, int]:
        """How often `δ` enters each statistic as a factor."""
        return {name: statistic.gradient_degree for name, statistic in self.block.statistics.items()}

    @property
    def sums_of_outer_products(self) -> list[str]:
        """The names of the statistics that are sums of outer products if they are matrices."""
        return [name for name, statistic in self.block.statistics.items() if statistic.symmetric]

    def statistics_dtype(self) -> torch.dtype:
        """The dtype of the statistics that are taken now. The weight may have been cast since the layer was built."""
        weight = self.modules[0].weight
        assert isinstance(weight, Tensor)
        return statistics_dtype(weight.dtype)

    def observe(self, inputs: Tensor, gradients: Tensor, known: State, plan: RowPlan) -> State:
        """The sums of the block's statistics over rows, see `TokenBlock.observe`."""
        self.layer.follow(gradients.device, gradients.dtype)
        return self.block.observe(of_end(self.layer.state, self.prefix), inputs, gradients, known, plan)

    def no_rows(self) -> State:
        """The sums over no rows: zeros."""
        state, device = self.layer.state, self.layer.device
        return {name: torch.zeros_like(state[self.prefix + name], device=device) for name in self.block.statistics}


def ends_of(layer: Layer) -> list[End]:
    """The ends of a layer of the K-FAC family."""
    if isinstance(layer.block, Tied):
        uses = {EMBEDDING: (layer.modules, layer.adapter), HEAD: (layer.head, LINEAR)}
        return [End(layer, block, *uses[prefix], prefix) for prefix, block in layer.block.ends.items()]
    return [End(layer, cast(TokenBlock, layer.block), layer.modules, layer.adapter)]
