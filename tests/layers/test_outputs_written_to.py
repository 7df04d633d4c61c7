"""A layer whose output is written to in place is captured as where a new tensor is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared.helpers import captured_factors, relative_error
from torch import Tensor, nn

import hf_so2

MASKED = torch.arange(10).reshape(2, 5) % 3 == 0


class Masking(nn.Module):
    """Zeroes the first layer's output at some positions, as speech models do at padding."""

    def __init__(self, bias: bool, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(4, 4, bias=bias) for _ in range(3))
        self.in_place = in_place
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, other = self.first(inputs), self.second(inputs)
        if self.in_place:
            hidden[MASKED] = 0
            other += hidden
        else:
            hidden = hidden.masked_fill(MASKED.unsqueeze(2), 0)
            other = other + hidden
        return self.last((hidden * other).tanh())


@pytest.mark.parametrize("settings", [{}, {"weight_sharing": "reduce"}, {"fisher": "mc"}])
@pytest.mark.parametrize("bias", [True, False])
def test_writing_in_place_changes_nothing(bias: bool, settings: dict[str, Any]) -> None:
    inputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for in_place in (True, False):
        model = Masking(bias, in_place)
        optimizer = hf_so2.build_optimizer("kfac", model, **settings)
        for _ in range(2):
            logits = model(inputs)
            optimizer.sample_fisher(logits)
            nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(10) % 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(captured_factors(optimizer))
    assert found[0].keys() == {"first.weight", "second.weight", "last.weight"}
    for name, factors in found[1].items():
        for key, value in factors.items():
            assert value.any()
            assert relative_error(found[0][name][key], value) < 1e-12, (name, key)
