"""Networks of several widths under the standard parametrization and under μP, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2 import optim
from hf_so2.papers.digits import Digits, mlp
from hf_so2.papers.training import FLOOR, optimizer_step, train
from hf_so2.transfer.reporting.optimum import find_optimum

BASE, LAYERS, BATCH = 32, 4, 128
PROBES = 256  # images on which changes are measured
BASE_SEED = 7_000


@dataclass(frozen=True)
class Setup:
    """A method as it is run at every width.

    Args:
        method: `kfac` or `shampoo`.
        norm_control: `none` is the paper's, `spectral` this package's default.
        mup: whether the width scales initialisation, rates and damping; else all stay as at the base width.
        damping_rule: see `hf_so2.damping`; `trace` is the paper's rescaled damping.
    """

    method: str
    norm_control: str = "none"
    mup: bool = True
    damping_rule: str = "trace"

    def __str__(self) -> str:
        name = {"kfac": "K-FAC", "shampoo": "Shampoo"}[self.method]
        control = ", spectral control" if self.norm_control == "spectral" else ""
        rule = "" if self.damping_rule == "trace" else f", {self.damping_rule} damping"
        return f"{name}{control}{rule}, {'μP' if self.mup else 'SP'}"

    def build(self, width: int, seed: int, learning_rate: float, damping: float) -> tuple[nn.Sequential, Any]:
        """The model and its optimizer."""
        model = mlp(width, LAYERS, seed)
        # Another draw of the base: μP reads the law of its standard deviations, not the values.
        base: dict[str, Any] = {"base_config": mlp(BASE, LAYERS, BASE_SEED)} if self.mup else {}
        optimizer = optim.build_optimizer(
            self.method + "_mup" * self.mup,
            model,
            lr=learning_rate,
            damping=damping,
            damping_rule=self.damping_rule,
            norm_control=self.norm_control,
            **base,
        )
        return model, optimizer


def score(
    setup: Setup, width: int, seed: int, digits: Digits, *, learning_rate: float, damping: float, steps: int
) -> float:
    """log10 of the training loss after some steps; infinite where training diverged."""
    model, optimizer = setup.build(width, seed, learning_rate, damping)
    return train(model, optimizer_step(optimizer), digits, steps=steps, batch=BATCH, seed=seed).score


def best_value(curve: Mapping[float, float]) -> float:
    """Where a curve of scores has its least, by a parabola in the logarithm around the best value tried.

    NaN where that lies on an edge of the grid: it proves nothing then.
    """
    optimum = find_optimum(curve)
    return math.nan if optimum is None or optimum.edge else optimum.value


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of a power law in the width, by least squares."""
    x = [math.log(width) for width in widths]
    y = [math.log(max(value, FLOOR)) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def preactivations(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """The outputs of every linear layer."""
    outputs = []
    with torch.no_grad():
        for module in model:
            images = module(images)
            if isinstance(module, nn.Linear):
                outputs.append(images)
    return outputs


def feature_changes(
    setup: Setup,
    width: int,
    seed: int,
    digits: Digits,
    *,
    learning_rate: float,
    damping: float,
    steps: int,
    last_layer: float = 1.0,
) -> list[float]:
    """`Δh`: the root mean square change of every layer's outputs after some steps.

    Args:
        last_layer: factor on the initial weights of the last layer.
    """
    model, optimizer = setup.build(width, seed, learning_rate, damping)
    scale_last_layer(model, last_layer)
    probes = digits.test_images[:PROBES]
    before = preactivations(model, probes)
    step = optimizer_step(optimizer)
    for images, labels in digits.batches(steps, BATCH, seed):
        step(model, images, labels)
    after = preactivations(model, probes)
    return [float((new - old).square().mean().sqrt()) for new, old in zip(after, before, strict=True)]


def scale_last_layer(model: nn.Sequential, factor: float) -> None:
    """Multiply the initial weights of the last layer."""
    with torch.no_grad():
        list(model.parameters())[-1].mul_(factor)


def kernel_solution(kernel: Tensor, among: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Kernel ridge regression: `k (K + N ρ I)⁻¹ y`, ρ = ε times the mean of K's diagonal.

    Args:
        kernel: (tests, N).
        among: K, (N, N).
        targets: y, (N, classes).
        epsilon: ε > 0.
    """
    ridge = len(among) * epsilon * float(among.diagonal().mean())
    return kernel @ torch.linalg.solve(among + ridge * torch.eye(len(among), dtype=among.dtype), targets)


def nngp_kernel(first: Tensor, second: Tensor, layers: int) -> Tensor:
    """The kernel of the last hidden activations of an infinitely wide ReLU network with He's initialisation.

    By the arc-cosine recursion (Cho & Saul 2009), without biases: `first` (N, pixels), `second` (M, pixels) -> (N, M).
    """
    lengths = torch.outer(first.norm(dim=1), second.norm(dim=1))
    angle = ((first @ second.mT) / lengths).clamp(-1, 1).acos()
    for _ in range(layers - 1):
        correlation = (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi
        angle = correlation.clamp(-1, 1).acos()
    # He's initialisation keeps lengths; a constant factor is all that is left out, and the ridge is relative to it.
    return lengths * angle.cos()
