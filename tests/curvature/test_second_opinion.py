"""A second opinion on the factors: `curvlinops-for-pytorch`, an implementation by other people.

Its operators approximate the Fisher matrix of the loss that they are given. For `reduction="mean"` over N examples of T
tokens that is `1/(NT) Σ`, which is our normalisation; for `"sum"` it is `Σ`, larger by NT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from shared.dense_fisher import approximation, linear_layers, mlp_case, relative, stand_still, transformer_case
from torch import Tensor, nn

pytest.importorskip("curvlinops", reason="pip install --no-deps -r tests/second_opinion.txt")
from curvlinops import EKFACLinearOperator, KFACLinearOperator


class ClassesSecond(nn.Module):
    """Logits as (batch, classes, tokens), as torch's cross-entropy and curvlinops want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.model(inputs)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        return logits if logits.ndim == 2 else logits.movedim(-1, 1)


def sequence_case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The MLP on sequences of vectors: weight sharing without attention."""
    model, _ = mlp_case()
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, 5, 7, generator=generator, dtype=torch.float64)
    return model, (inputs, torch.randint(0, 5, (6, 5), generator=generator))


CASES = {"mlp": mlp_case, "sequences": sequence_case, "transformer": transformer_case}


def second_opinion(
    operator: Any, model: nn.Module, module: nn.Module, batch: tuple[Tensor, Tensor], reduction: str, **options: Any
) -> np.ndarray:
    """The dense block of one weight, from two mini-batches."""
    (inputs, targets), cut = batch, 2
    data = [(inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:])]
    loss = nn.CrossEntropyLoss(reduction=reduction)
    options = {"fisher_type": "empirical", "check_deterministic": False, "progressbar": False} | options
    weight = module.weight
    block = operator(ClassesSecond(model), loss, [weight], data, **options)
    return (block @ torch.eye(weight.numel(), dtype=weight.dtype)).detach().numpy()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_kfac_equals_curvlinops_expand(case: str, reduction: str) -> None:
    model, batch = CASES[case]()
    optimizer = stand_still("kfac", model, batch)
    optimizer.curvature.capture.remove()
    unit = batch[1].numel() if reduction == "sum" else 1
    for name, module in linear_layers(model).items():
        ours = approximation("kfac", optimizer.curvature.layers[name].state)
        theirs = second_opinion(KFACLinearOperator, model, module, batch, reduction, kfac_approx="expand")
        assert relative(ours * unit, theirs) < 1e-11, name


@pytest.mark.parametrize("case", CASES)
def test_foof_equals_curvlinops_forward_only(case: str) -> None:
    model, batch = CASES[case]()
    optimizer = stand_still("foof", model, batch)
    optimizer.curvature.capture.remove()
    for name, module in linear_layers(model).items():
        state = optimizer.curvature.layers[name].state
        ours = np.kron(np.eye(len(module.weight)), (state["A"] / state["weight"]).numpy())
        theirs = second_opinion(KFACLinearOperator, model, module, batch, "mean", fisher_type="forward-only")
        assert relative(ours, theirs) < 1e-12, name


def test_ekfac_equals_curvlinops() -> None:
    """On single vectors only: curvlinops corrects shared weights by sums over a sequence, not token by token."""
    model, batch = mlp_case()
    optimizer = stand_still("ekfac", model, batch)
    optimizer.curvature.capture.remove()
    for name, module in linear_layers(model).items():
        ours = approximation("ekfac", optimizer.curvature.layers[name].state)
        theirs = second_opinion(EKFACLinearOperator, model, module, batch, "mean")
        assert relative(ours, theirs) < 1e-11, name
