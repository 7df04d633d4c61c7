"""What one step makes of a network whose last layer starts at zero: kernel regression."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2.papers.data import CLASSES, digits
from hf_so2.papers.mup.features import preactivations, scale_last_layer
from hf_so2.papers.mup.setups import LAYERS, MLP, Setup
from hf_so2.papers.training import optimizer_step

WIDTHS = (32, 128, 512, 1024)
DAMPING = 0.1


def first_step_from_zero(seed: int) -> dict[str, Any]:
    """What one step of K-FAC on all images makes of a network whose last layer starts at zero, and at random.

    At zero the gradient of every earlier layer is zero, so only the last one moves: by `G (A + ρI)⁻¹` with `A` the
    second moment of fixed features, which is kernel ridge regression on the labels. Its kernel is that of the features,
    at infinite width the NNGP kernel.
    """
    examples = digits()
    images, tests = examples.inputs.double(), examples.test_inputs.double()
    residuals = torch.nn.functional.one_hot(examples.labels, CLASSES).double() - 1 / CLASSES
    limit = kernel_solution(
        nngp_kernel(tests, images, LAYERS - 1), nngp_kernel(images, images, LAYERS - 1), residuals, DAMPING
    )
    record: dict[str, Any] = {"seed": seed}
    for start, factor in (("zero", 0.0), ("random", 1.0)):
        by_width: dict[int, dict[str, float]] = {}
        for width in WIDTHS:
            model, optimizer = Setup("kfac").build(MLP, width, seed, {"learning_rate": 1.0, "damping": DAMPING})
            scale_last_layer(model, factor)
            step = optimizer_step(optimizer)
            before = preactivations(model, examples.test_inputs)
            hidden, hidden_test = features(model, examples.inputs), features(model, examples.test_inputs)
            own = kernel_solution(hidden_test @ hidden.mT, hidden @ hidden.mT, residuals, DAMPING)
            step(model, examples.inputs, examples.labels)
            after = preactivations(model, examples.test_inputs)
            changes = [float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]
            moved = (after[-1] - before[-1]).double()
            by_width[width] = {
                "hidden_change": max(changes[:-1]),
                "output_change": changes[-1],
                "cosine_own_kernel": _cosine(moved, own),
                "cosine_nngp_kernel": _cosine(moved, limit),
            }
        record[start] = by_width
    return record


def features(model: nn.Module, images: Tensor) -> Tensor:
    """The inputs of the last layer, float64."""
    with torch.no_grad():
        return nn.Sequential(*list(model.children())[:-1])(images).double()


def _cosine(first: Tensor, second: Tensor) -> float:
    product = float((first * second).sum() / (first.norm() * second.norm()))
    return product if math.isfinite(product) else 0.0


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
