"""Training takes no more memory after a thousand steps than after a few hundred."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import hf_so2


def live_tensors() -> tuple[int, int]:
    """How many there are, and the bytes of the memory behind them."""
    gc.collect()
    # By type: to ask every object there is with `isinstance` makes deprecated ones of torch warn.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout is torch.strided and not isinstance(t, FakeTensor)
    }
    return len(tensors), sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_memory_does_not_grow_over_a_thousand_steps(every: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    optimizer = hf_so2.build_optimizer("kfac", net, factor_update_steps=every)
    generator = torch.Generator().manual_seed(0)

    def train(steps: int) -> None:
        for _ in range(steps):
            inputs = torch.randn(16, 6, generator=generator)
            labels = torch.randint(0, 5, (16,), generator=generator)
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    # From the start: what replaces an object that was not traced would look like growth.
    tracemalloc.start()
    try:
        train(300)
        tensors, (traced, _) = live_tensors(), tracemalloc.get_traced_memory()
        train(700)
        assert live_tensors() == tensors
        # Less than a small object from every step; interpreter and torch keep up to 25 kB back for reuse, or do not.
        assert tracemalloc.get_traced_memory()[0] < traced + 700 * 64
    finally:
        tracemalloc.stop()
