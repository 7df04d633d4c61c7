"""Update directions that are made of one batch alone: exact second-order ones, and K-FAC's and FOOF's beside them.

Every direction sees the same gradient and the same curvature examples, labels drawn from the model's own predictions,
and keeps nothing from earlier steps. So what differs between two of them is the approximation and its damping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_so2.curvature import EKFAC, FOOF, KFAC, TokenBlock
from hf_so2.damping import Damping
from hf_so2.papers.tekfac.approximations import Rows, rows_of
from hf_so2.papers.training import Step

Named: TypeAlias = Mapping[str, Tensor]
Direction: TypeAlias = Callable[[nn.Sequential, Tensor, Named, float, torch.Generator], dict[str, Tensor]]
"""(model, curvature examples, gradient by name, damping, generator of labels) -> update by name."""


def exact(
    model: nn.Sequential, images: Tensor, gradients: Named, damping: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """`(F + ρI)⁻¹ g` over the whole network."""
    layers = rows_of(model, images, generator)
    return dict(zip(gradients, kernel_solve(layers, list(gradients.values()), damping), strict=True))


def block_diagonal(
    model: nn.Sequential, images: Tensor, gradients: Named, damping: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The same layer by layer."""
    layers = rows_of(model, images, generator)
    pairs = zip(layers, gradients.items(), strict=True)
    return {name: kernel_solve([layer], [g], damping)[0] for layer, (name, g) in pairs}


def kernel_solve(layers: Sequence[Rows], gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
    """What `hf_so2.natural_gradient` does, where the gradients of examples are outer products of rows.

    None of them is written out: of `R` with rows `δ hᵀ / √N`, the kernel `R Rᵀ` is `Σ (H Hᵀ) ∘ (Δ Δᵀ) / N` over layers.
    """
    n = len(layers[0].h)
    kernel = sum((layer.h @ layer.h.mT) * (layer.delta @ layer.delta.mT) for layer in layers) / n
    along = sum(((layer.delta @ g) * layer.h).sum(dim=1) for layer, g in zip(layers, gradients, strict=True)) / n**0.5
    assert isinstance(kernel, Tensor)
    assert isinstance(along, Tensor)
    kernel.diagonal().add_(damping)
    weights = torch.cholesky_solve(along.unsqueeze(1), torch.linalg.cholesky(kernel)) / n**0.5
    return [(g - (layer.delta * weights).mT @ layer.h) / damping for layer, g in zip(layers, gradients, strict=True)]


def gradient(
    model: nn.Sequential, images: Tensor, gradients: Named, damping: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Gradient descent, for which the damping means nothing."""
    return dict(gradients)


def of_blocks(block: TokenBlock, rule: str) -> Direction:
    """The direction of one of the package's curvature blocks."""

    def direction(
        model: nn.Sequential, images: Tensor, gradients: Named, damping: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        updates = {}
        for (name, g), rows in zip(gradients.items(), rows_of(model, images, generator), strict=True):
            state = block.init_state((g.shape[0], g.shape[1]), g.device, g.dtype)
            sums = block.observe(state, rows.h, rows.delta)
            block.update(state, {key: value / len(rows.h) for key, value in sums.items()})
            block.refresh(state, Damping(rule, damping))
            updates[name] = block.precondition(state, g)
        return updates

    return direction


# EKFAC that has been refreshed once has K-FAC's own eigenvalues for moments: `(A ⊗ B + ρI)⁻¹`, damped as the exact
# matrix is. The heuristic one damps the factors, `(A + π√ρ I) ⊗ (B + √ρ/π I)`, which adds much more to small ones.
DIRECTIONS: Mapping[str, Direction] = {
    "gradient": gradient,
    "natural gradient": exact,
    "block-diagonal": block_diagonal,
    "K-FAC": of_blocks(KFAC(beta=0.0), "pi"),
    "K-FAC, standard damping": of_blocks(EKFAC(beta=0.0), "constant"),
    "FOOF": of_blocks(FOOF(beta=0.0), "constant"),
}


def gradients_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy, by name."""
    weights = dict(model.named_parameters())
    loss = cross_entropy(model(images), labels)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def step_along(
    direction: Direction,
    learning_rate: float,
    damping: float,
    seed: int,
    curvature_images: Callable[[], Tensor] | None = None,
    momentum: float = 0.9,
) -> Step:
    """A training step: momentum on the gradient, then the direction, as in the package's optimizers.

    Args:
        direction: one of `DIRECTIONS`.
        learning_rate: times the direction.
        damping: ρ.
        seed: of the drawn labels.
        curvature_images: examples of the Fisher matrix; those of the batch where it is None.
        momentum: decay of the average of gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    average: dict[str, Tensor] = {}

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
        assert isinstance(model, nn.Sequential)
        for name, g in gradients_of(model, images, labels).items():
            average[name] = g * (1 - momentum) + average[name] * momentum if name in average else g
        examples = images if curvature_images is None else curvature_images()
        updates = direction(model, examples, average, damping, generator)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(updates[name], alpha=learning_rate)

    return step


def cosine(first: Named, second: Named) -> float:
    """Of the angle between two updates of the whole network."""
    a, b = (torch.cat([value.reshape(-1) for value in update.values()]) for update in (first, second))
    return float(a @ b / (a.norm() * b.norm()))
