"""The size of preconditioned updates: a table of functions that scale the updates of all layers in place."""

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

# A cold start has to find the leading directions. A warm start only has to follow them from one step to the next.
# Errors of the norm measured on Llamas of width 64 to 256: at worst 0.1 % on average, and 2 % in one case of a hundred.
# One iteration more gives 0.04 % and 1.3 %. Four iterations of one vector gave 1.5 %, and at times 30 %.
COLD_ITERATIONS, WARM_ITERATIONS, DIRECTIONS = 8, 2, 16


def unchanged(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Leave the updates as the method made them."""


def kl_clip(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """One factor for the whole model: `ν = min(1, sqrt(κ / Σ_l lr_l² <P(G_l), G_l>))`.

    `Σ lr² <P(G), G>` estimates twice the KL divergence of the step. κ does not depend on the width (Osawa et al. 2020,
    arXiv 2002.06015, after Ba et al. 2017).
    """
    if updates:
        products = torch.stack([u.group["lr"] ** 2 * (u.update * u.moment).sum() for u in updates])
        divergence = over_parts(updates, products).sum()
        # Round-off can make the sum slightly negative; `clamp` corrects it. An infinite ratio means ν = 1.
        factor = torch.sqrt(settings.kl_clip / divergence.clamp(min=0)).clamp(max=1.0)
        # A divergence that overflows (at worst inf - inf) is certainly too large: no step.
        factor = factor.nan_to_num(0.0)
        for u in updates:
            u.update.mul_(factor)


def spectral(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Every update gets the spectral norm `sqrt(fan_out/fan_in)` (Qiu et al. 2025, arXiv 2512.05620).

    The target already contains μP's width scaling. No learning-rate multiplier is needed in addition. An update of zero
    stays zero.

    An embedding has its own target, see `_embedding_size`.
    """
    layer, (fan_out, fan_in) = updates[0].layer, updates[0].update.shape
    target = math.sqrt(fan_out / fan_in)
    if layer.adapter.one_hot or layer.block.orthogonal:
        for u in updates:
            u.update.mul_(_ratio(1.0, _embedding_size(u)) if layer.adapter.one_hot else target)
        return
    for is_warm in (True, False):
        if alike := [u for u in updates if ("leading_directions" in u.layer.state) == is_warm]:
            _set_spectral_norm(alike, target, is_warm=is_warm)


def _set_spectral_norm(updates: Sequence[LayerUpdate], target: float, *, is_warm: bool) -> None:
    """Scale updates of one shape, each by its own norm. The state keeps the start of the next power iteration."""
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
    """The root mean square change of a token's vector, weighted by token frequency. For a tied weight see `_tied_size`.

    The spectral norm does not suit an embedding. Its inputs are unit vectors, and the spectral norm covers mixtures of
    them that never occur. The target `sqrt(fan_out/vocabulary)` would make a token's step shrink with the size of the
    vocabulary.

    The norm induced by unit vectors is the largest norm of a column (Large et al. 2024, arXiv 2405.14813). But this
    column belongs to the rarest token of the last steps. Its mean gradient is the noisiest, and it would make the steps
    of all other tokens smaller. With the columns weighted by frequency, the measured loss was 0.04 nats lower. A method
    that sees no tokens knows no frequencies and takes the largest column.
    """
    state = u.layer.state
    if "A" not in state:
        return u.update.square().mean(dim=0).amax().sqrt()
    if "head_A" in state:
        return _tied_size(u)
    # TKFAC's factor weights tokens by their gradients too, so it keeps the frequencies separately.
    counts = state.get("frequencies", state["A"])
    frequencies = counts / counts.sum()
    return (frequencies * u.update.square().mean(dim=0)).sum().sqrt()


def _tied_size(u: LayerUpdate) -> Tensor:
    """The root mean square change of the weight's outputs, weighted by token frequency.

    The outputs are entries of an embedding vector or logits; the larger change counts. A step that is small for the
    embedding adds up in a logit over all hidden dimensions. At a width of 32, a tenth of the embedding's step was best
    when tuned by hand. Counting the logits gives the same. The head's inputs are those that were captured: they include
    the factor that μP or a model family puts on a tied head's inputs.
    """
    state, least = u.layer.state, torch.finfo(u.update.dtype).tiny
    # An end that no token has reached has averages of zero, so `clamp` avoids a division by zero.
    frequencies = state["A"] / state["A"].sum().clamp(min=least)
    of_vectors = (frequencies * u.update.square().mean(dim=0)).sum()
    inputs = state["head_A"] / state["head_weight"].clamp(min=least)
    of_logits = ((inputs @ u.update) * u.update).sum() / u.update.shape[1]
    return torch.maximum(of_vectors, of_logits).sqrt()


def graft_sgd(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Every update gets the Frobenius norm of SGD's update.

    SGD's update is the average of gradients that was preconditioned. With `momentum_order` "after" it is the gradient
    itself.
    """
    for u in updates:
        _graft(u, u.moment)


def graft_adam(updates: Sequence[LayerUpdate], settings: StepSettings) -> None:
    """Every update gets the Frobenius norm of Adam's update (Agarwal et al. 2020, arXiv 2002.11803; Anil et al. 2020,
    arXiv 2002.09018).

    Adam has the same momentum, and the group's second beta and epsilon. Both moments are bias-corrected. With
    `momentum_order` "after" the first moment is the gradient itself, as in RMSprop.
    """
    for u in updates:
        (_, beta2), state = u.group["betas"], u.layer.state
        if "graft_second_moment" not in state:
            state["graft_second_moment"] = torch.zeros_like(u.gradient, memory_format=torch.contiguous_format)
        second = state["graft_second_moment"]
        # An infinite square would never leave the average.
        second.lerp_(u.gradient.square().clamp_(max=torch.finfo(second.dtype).max), 1 - beta2)
        first = u.moment
        if settings.momentum_order == "before" and not u.layer.block.corrects_momentum:
            first = first / momentum_weight(u.layer, settings)
        _graft(u, first / ((second / (1 - beta2**u.layer.steps)).sqrt() + u.group["eps"]))


def _graft(u: LayerUpdate, grafted: Tensor) -> None:
    """Give the update the Frobenius norm of `grafted`."""
    # Entries are divided by the largest one, so that their squares neither overflow nor vanish together.
    largest = _largest_entry(grafted)
    u.update.div_(_largest_entry(u.update))
    norm = torch.linalg.vector_norm(grafted / largest) * largest
    u.update.mul_(_ratio(norm, torch.linalg.vector_norm(u.update)))


def _largest_entry(matrix: Tensor) -> Tensor:
    """The largest magnitude of an entry, 0-dim; 1 for a matrix of zeros."""
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
        of_the_whole_model: whether it needs all updates together. Any other control looks at one layer at a time. It
            runs on the ranks that hold the layer, before the update is sent to other ranks.
        needs: what it needs besides the update: nothing, the `moment` that was preconditioned, or the `gradient` of the
            step.
        fixes_length: whether the length of a step is independent of the gradient's length, however large that is.
        kept: names of the tensors that it keeps in a layer's state for its next call of LAPACK.
        width_rule: how a learning rate in its unit scales with the width; None if the method's own rule holds.
        lr: an untuned learning rate in its unit to start from; None if the method's own holds.
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
