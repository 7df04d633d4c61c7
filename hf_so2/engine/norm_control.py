"""How large a preconditioned update may be: a table of functions that scale the updates of all layers in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.engine.preconditioned import LayerUpdate, momentum_weight, over_parts
from hf_so2.engine.step_settings import StepSettings
from hf_so2.linalg import spectral_norm
from hf_so2.mup import rules
from hf_so2.weights.stacks import stacks

# A cold start has to find the leading directions, a warm one only to follow them from one step to the next. Measured on
# Llamas of width 64 to 256 this is 0.1 % off on average at worst, and 2 % in one of a hundred (with one iteration more
# 0.04 % and 1.3 %); four iterations of one vector were 1.5 % off, at times 30.
COLD_ITERATIONS, WARM_ITERATIONS, DIRECTIONS = 8, 2, 16


def unchanged(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Leave the updates as the method made them."""


def kl_clip(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """One factor for the whole model: `ν = min(1, sqrt(κ / Σ_l lr_l² <P(G_l), G_l>))`.

    `Σ lr² <P(G), G>` estimates twice the KL divergence of the step; κ is free of the width (Osawa et al. 2020,
    arXiv 2002.06015, after Ba et al. 2017).
    """
    if updates:
        products = torch.stack([u.group["lr"] ** 2 * (u.update * u.moment).sum() for u in updates])
        divergence = over_parts(updates, products).sum()
        # `clamp` guards against a tiny negative sum of round-off; an infinite ratio means ν = 1.
        factor = torch.sqrt(settings.kl_clip / divergence.clamp(min=0)).clamp(max=1.0)
        # A divergence out of range, inf - inf at worst, is surely too large: no step.
        factor = factor.nan_to_num(0.0)
        for u in updates:
            u.update.mul_(factor)


def spectral(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Every update gets the spectral norm `sqrt(fan_out/fan_in)` (Qiu et al. 2025, arXiv 2512.05620).

    The target holds μP's width scaling, so no learning-rate multiplier is applied besides. An update of zero stays
    zero.

    An embedding gets its own target, see `_embedding_size`.
    """
    for together in stacks(updates, lambda u: u.layer):
        if together[0].layer.adapter.one_hot:
            for u in together:
                u.update.mul_(_ratio(1.0, _embedding_size(u)))
            continue
        target = math.sqrt(together[0].update.shape[0] / together[0].update.shape[1])
        if together[0].layer.block.orthogonal:
            for u in together:
                u.update.mul_(target)
            continue
        for is_warm in (True, False):
            if alike := [u for u in together if ("leading_directions" in u.layer.state) == is_warm]:
                _set_spectral_norm(alike, target, is_warm=is_warm)


def _set_spectral_norm(updates: Sequence[LayerUpdate], target: float, *, is_warm: bool) -> None:
    """Scale updates of one shape, each by its own norm; where the power iteration begins is kept from step to step."""
    first, iterations = updates[0].update, WARM_ITERATIONS if is_warm else COLD_ITERATIONS
    if is_warm:
        starts = [u.layer.state["leading_directions"] for u in updates]
    else:
        starts = [first.new_zeros(first.shape[1], min(DIRECTIONS, *first.shape))] * len(updates)
    if len(updates) == 1:
        norm, directions = spectral_norm(first, starts[0], iterations)
        norms, found = [norm], [directions]
    else:
        stacked = spectral_norm(torch.stack([u.update for u in updates]), torch.stack(starts), iterations)
        norms, found = (list(part.unbind()) for part in stacked)
    for u, norm, directions in zip(updates, norms, found, strict=True):
        u.layer.state["leading_directions"] = directions
        u.update.mul_(_ratio(target, norm))


def _embedding_size(u: LayerUpdate) -> Tensor:
    """The root mean square change of a token's vector, over tokens as they occur; of a tied weight see `_tied_size`.

    An embedding is fed unit vectors, of which a spectral norm would allow mixtures that never occur, and a target of
    `sqrt(fan_out/vocabulary)` would let a token's step shrink with the size of the vocabulary. The norm induced by unit
    vectors is the largest one of a column (Large et al. 2024, arXiv 2405.14813); but that one belongs to the rarest
    token of late, whose mean gradient is the noisiest, and all others would move less for it. Weighted by frequencies
    the same columns measured 0.04 nats better. A method that sees no tokens knows no frequencies and takes the largest.
    """
    state = u.layer.state
    if "A" not in state:
        return u.update.square().mean(dim=0).amax().sqrt()
    if "head_A" in state:
        return _tied_size(u)
    # TKFAC's factor weighs tokens by their gradients, too.
    counts = state.get("frequencies", state["A"])
    frequencies = counts / counts.sum()
    return (frequencies * u.update.square().mean(dim=0)).sum().sqrt()


def _tied_size(u: LayerUpdate) -> Tensor:
    """The root mean square change of what comes out of the weight, over tokens as they occur: of an entry of a vector
    looked up or of a logit, whichever is larger.

    A step that is modest for the embedding adds up over all hidden dimensions in a logit: tuned by hand, a tenth of it
    was best at a width of 32, which is what counting the logits makes of it. The head's inputs are taken as they were
    captured, and with them what μP or a family multiplies a tied head's inputs by.
    """
    state, least = u.layer.state, torch.finfo(u.update.dtype).tiny
    # An end that no token has reached has averages of zero.
    frequencies = state["A"] / state["A"].sum().clamp(min=least)
    of_vectors = (frequencies * u.update.square().mean(dim=0)).sum()
    inputs = state["head_A"] / state["head_weight"].clamp(min=least)
    of_logits = ((inputs @ u.update) * u.update).sum() / u.update.shape[1]
    return torch.maximum(of_vectors, of_logits).sqrt()


def graft_sgd(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Every update gets the Frobenius norm of SGD's: of the average of gradients that was preconditioned.

    With `momentum_order` "after" that is the gradient itself.
    """
    for u in updates:
        _graft(u, u.moment)


def graft_adam(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Every update gets the Frobenius norm of Adam's (Agarwal et al. 2020, arXiv 2002.11803; Anil et al. 2020,
    arXiv 2002.09018): same momentum, the group's second beta and epsilon, both moments bias-corrected.

    With `momentum_order` "after" the first moment is the gradient itself, as in RMSprop.
    """
    for u in updates:
        (_, beta2), state = u.group["betas"], u.layer.state
        if "graft_second_moment" not in state:
            state["graft_second_moment"] = torch.zeros_like(u.gradient, memory_format=torch.contiguous_format)
        second = state["graft_second_moment"]
        # An infinite square would stay in the average for ever.
        second.lerp_(u.gradient.square().clamp_(max=torch.finfo(second.dtype).max), 1 - beta2)
        first = u.moment
        if settings.momentum_order == "before" and not u.layer.block.corrects_momentum:
            first = first / momentum_weight(u.layer, settings)
        _graft(u, first / ((second / (1 - beta2**u.layer.steps)).sqrt() + u.group["eps"]))


def _graft(u: LayerUpdate, grafted: Tensor) -> None:
    """Give the update the Frobenius norm of `grafted`."""
    # Relative to the largest entry, squares leave neither end of the range.
    largest = _largest_entry(grafted)
    u.update.div_(_largest_entry(u.update))
    norm = torch.linalg.vector_norm(grafted / largest) * largest
    u.update.mul_(_ratio(norm, torch.linalg.vector_norm(u.update)))


def _largest_entry(matrix: Tensor) -> Tensor:
    """In magnitude, 0-dim; 1 for a matrix of zeros."""
    largest = matrix.abs().amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _ratio(target: Tensor | float, norm: Tensor) -> Tensor:
    """`target / norm`; an update of zero stays zero."""
    return torch.where(norm > 0, target / norm, torch.zeros_like(norm))


@dataclass(frozen=True)
class NormControl:
    """One way to fix the size of preconditioned updates.

    Args:
        apply: scales the updates of a stack, or of the whole model, in place.
        of_the_whole_model: whether it looks at all updates together. The others look at one layer at a time, and so
            where the layer is held, before its update is sent to other ranks.
        needs: what it looks at besides the update: nothing, the `moment` that was preconditioned, or the `gradient` of
            the step.
        fixes_length: whether the length of a step does not follow that of the gradient, however large it is.
        kept: the names of what it has in the state of a layer for its next call of LAPACK.
        width_rule: how a learning rate in its unit scales with the width; None where the method's own rule holds.
        lr: a learning rate in its unit to start from, not tuned; None where that is the method's to say.
    """

    apply: Callable[[Sequence[LayerUpdate], StepSettings], None]
    of_the_whole_model: bool = False
    needs: str = ""
    fixes_length: bool = False
    kept: tuple[str, ...] = ()
    width_rule: rules.LearningRateRule | None = None
    lr: float | None = None


NORM_CONTROLS: dict[str, NormControl] = {
    "none": NormControl(unchanged),
    "kl_clip": NormControl(kl_clip, of_the_whole_model=True, needs="moment"),
    "graft_adam": NormControl(graft_adam, needs="gradient", fixes_length=True, width_rule=rules.ADAM, lr=0.002),
    "graft_sgd": NormControl(graft_sgd, needs="moment", width_rule=rules.SGD, lr=0.1),
    "spectral": NormControl(spectral, fixes_length=True, kept=("leading_directions",), width_rule=rules.NONE),
}
