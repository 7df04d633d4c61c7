"""How much one or a few steps change the outputs of every layer of an MLP, over the width."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_so2.papers.data import digits
from hf_so2.papers.mup.setups import MLP, Setup
from hf_so2.papers.training import optimizer_step

PROBES = 256  # images on which changes are measured


def preactivations(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs of every linear layer."""
    outputs = []
    with torch.no_grad():
        for module in model.children():
            images = module(images)
            if isinstance(module, nn.Linear):
                outputs.append(images)
    return outputs


def feature_changes(
    setup: Setup, width: int, seed: int, values: Mapping[str, float], steps: int, last_layer: float = 1.0
) -> list[float]:
    """`Δh` of an MLP: the root mean square change of every layer's outputs after some steps.

    Args:
        last_layer: factor on the initial weights of the last layer.
    """
    model, optimizer = setup.build(MLP, width, seed, values)
    scale_last_layer(model, last_layer)
    probes = digits().test_inputs[:PROBES]
    before = preactivations(model, probes)
    step = optimizer_step(optimizer)
    for inputs, labels in digits().batches(steps, MLP.batch, seed):
        step(model, inputs, labels)
    after = preactivations(model, probes)
    return [float((new - old).square().mean().sqrt()) for new, old in zip(after, before, strict=True)]


def scale_last_layer(model: nn.Module, factor: float) -> None:
    """Multiply the initial weights of the last layer."""
    with torch.no_grad():
        list(model.parameters())[-1].mul_(factor)
