"""Why `A` is a mean over rows and `B` a mean over loss tokens when labels are masked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_so2


@pytest.mark.parametrize("tokens", [35, 12, 5])
def test_factors_multiply_to_the_exact_block_when_labels_are_masked(tokens: int) -> None:
    """All pairs of 7 inputs and 5 gradients make `h` and `δ` independent, so that `F = Σ hhᵀ⊗δδᵀ / tokens` is a
    Kronecker product exactly. Dividing both factors by the loss tokens would miss it by `rows / tokens`.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 4, generator=generator, dtype=torch.float64).repeat_interleave(5, dim=0)
    gradients = torch.randn(5, 3, generator=generator, dtype=torch.float64).repeat(7, 1)
    layer = nn.Linear(4, 3, bias=False).double()
    optimizer = hf_so2.build_optimizer("kfac", layer, norm_control="none")
    assert optimizer.curvature is not None
    optimizer.announce(tokens=tokens, gradient_scale=1 / tokens)
    ((layer(inputs) * gradients).sum() / tokens).backward()
    optimizer.step()

    examples = torch.einsum("ro,ri->roi", gradients, inputs).reshape(35, -1)
    exact = examples.mT @ examples / tokens
    state = optimizer.curvature.layers["weight"].state
    a, b = state["A"] / state["weight"], state["B"] / state["weight"]
    torch.testing.assert_close(torch.kron(b, a), exact, rtol=1e-12, atol=1e-13)
    both_by_tokens = torch.kron(b, a * 35 / tokens)
    assert (torch.allclose(both_by_tokens, exact)) == (tokens == 35)
