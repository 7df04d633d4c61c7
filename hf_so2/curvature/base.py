"""The interface of a curvature method: a few statistics, of tokens or of gradients, and functions on a dictionary of
tensors, the state.

Convention of this package: a layer computes `u = W h`. Every matrix is `(fan_out, fan_in)`. `inputs` are the rows `h`
of shape (rows, fan_in), or for one-hot `h` the integers (rows,) of `hf_so2.curvature.parts.forms`. `gradients` are the
rows `δ = ∂ℓ/∂u` of shape (rows, fan_out), where ℓ is each token's own loss. A block knows nothing of modules,
processes, the Trainer or μP.

Stacks: `refresh`, `observe_gradient`, `precondition` and `rotate` also take several weights of one shape at once. Every
tensor of the state, the gradient and the numbers of `Damping` then have the same leading dimensions. A stack of k gives
the same results as k single calls, up to round-off.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_so2.curvature.parts.costs import Shape
from hf_so2.damping import Damping
from hf_so2.linalg import per_matrix

State = dict[str, Tensor]
Fold = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Statistic:
    """How a sum over rows becomes a mean that depends neither on the batch split nor on the loss scale.

    Args:
        gradient_degree: how often `δ` enters as a factor. If gradients are captured `c` times too large, the sum is
            `c**gradient_degree` times too large.
        per: the divisor of the sum: the `tokens` of the loss, or the `rows` that the layer saw. Both are the same
            number unless labels are masked. With masked labels `Σ h hᵀ ⊗ δ δᵀ / tokens` factors into
            `(Σ h hᵀ / rows) ⊗ (Σ δ δᵀ / tokens)` for independent `h` and `δ` (Eschenhagen et al. 2023,
            arXiv 2311.00636, equation 22). `tr A` does not depend on how many labels are masked.
        symmetric: whether the statistic, if it is a matrix, is a sum of products `x xᵀ` with weights ≥ 0.
    """

    gradient_degree: int
    per: str
    symmetric: bool = False


class CurvatureBlock(Protocol):
    """One layer's preconditioner. The object holds settings only. All values that change are in the state.

    The state holds running averages and, under `weight` (0-dim), the running average of 1, zero until the first update.
    The two kinds of blocks below average different quantities: sums over tokens, or products of gradients.

    Attributes:
        building_steps: number of first updates of the statistics during which the weight and its momentum do not move.
        corrects_momentum: whether the momentum has to be bias-corrected before it is preconditioned.
        orthogonal: whether every singular value of an update is about 1.
    """

    building_steps: ClassVar[int] = 0
    corrects_momentum: ClassVar[bool] = False
    orthogonal: ClassVar[bool] = False

    @abstractmethod
    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        """Zeroed state of a weight of `shape` (fan_out, fan_in)."""
        ...

    @abstractmethod
    def update(self, state: State, observation: State) -> None:
        """Move the running averages towards the means in `observation`."""
        ...

    @abstractmethod
    def refresh(self, state: State, damping: Damping) -> None:
        """Rebuild the preconditioner from the running averages. A failed decomposition leaves the old one unchanged.

        Raises:
            DecompositionError: the damped factors cannot be inverted.
        """
        ...

    @property
    @abstractmethod
    def refreshed(self) -> list[str]:
        """The names in the state that `refresh` writes. Ranks that did not refresh must be sent these tensors.

        The name of a tensor from the decomposition of a factor ends in `_root` (symmetric) or `_basis`. The size of the
        tensor determines the cost of the refresh.
        """
        ...

    @property
    def observed(self) -> list[str]:
        """The names in the state whose values are needed to observe tokens. Of all others only shape and dtype are."""
        return []

    @abstractmethod
    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """`P(G)` for `G` of shape (fan_out, fan_in)."""
        ...

    # Diagnostics and costs.

    @abstractmethod
    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        """Trace, damping ρ and condition number of the damped factors, see `hf_so2.curvature.parts.spectrum`.

        Raises:
            DecompositionError: as `refresh`, if the damping rule needs eigenvalues.
        """
        ...

    @abstractmethod
    def refresh_flops(self, shape: Shape) -> float:
        """FLOPs of one refresh."""
        ...

    @abstractmethod
    def precondition_flops(self, shape: Shape) -> float:
        """FLOPs to precondition one gradient."""
        ...

    @abstractmethod
    def statistics_flops(self, shape: Shape, tokens: int) -> float:
        """FLOPs of one update of the statistics.

        Args:
            shape: shape of the weight.
            tokens: number of rows that the layer sees. A block of gradients ignores it.
        """
        ...

    def curvature_along(self, state: State, change: Tensor) -> Tensor | None:
        """`<Δ, F Δ>`, 0-dim, with the block's own undamped approximation F of the Fisher matrix; None without one.

        Args:
            state: the block's state.
            change: Δ, (fan_out, fan_in).
        """
        return None

    @property
    def models_the_loss(self) -> bool:
        """Whether `curvature_along` gives the curvature of the loss along a change."""
        return False


class Plan(Protocol):
    """How rows enter the statistics. The gradients of rows that do not count are zero.

    Attributes:
        weights: which rows count, as numbers (rows, 1); None if the inputs of all other rows are zero, too.
    """

    @property
    def weights(self) -> Tensor | None: ...

    def fold(self, dimension: int) -> Fold | None:
        """A function of rows (rows, n) and their weights (rows, 1) or None, to fewer rows.

        These have the same sum of outer products on average. None if all rows are used.
        """
        ...

    def sample(self) -> tuple[Tensor, float] | None:
        """The indices of some rows, and how many rows each stands for; None for all."""
        ...


class TokenBlock(CurvatureBlock, Protocol):
    """A block that sees every token's input and output gradient: the K-FAC family."""

    @property
    @abstractmethod
    def statistics(self) -> dict[str, Statistic]:
        """The statistics that are summed over tokens. The state holds a running average under each of the names."""
        ...

    @abstractmethod
    def observe(
        self,
        state: State,
        inputs: Tensor,
        gradients: Tensor,
        known: State | None = None,
        plan: Plan | None = None,
    ) -> State:
        """The block's statistics as sums over rows. The sums of two batches add up to the sums of their union.

        Args:
            known: sums of the same inputs that are already computed. They are returned as they are.
            plan: which rows count, and how many of them are enough; None for all.
        """
        ...


@runtime_checkable
class GradientBlock(CurvatureBlock, Protocol):
    """A block that sees the gradient of each step's mean loss: the Shampoo family."""

    @abstractmethod
    def observe_gradient(self, state: State, gradient: Tensor) -> State:
        """The block's statistics of one gradient, (fan_out, fan_in)."""
        ...


@runtime_checkable
class RotatingBlock(GradientBlock, Protocol):
    """A block that divides in its own coordinates, and can keep the momentum there.

    Averages commute with rotations. A gradient is rotated once a step for the statistics, and its average then needs no
    second rotation.

    Attributes:
        keeps_momentum: whether the state holds an average of rotated gradients under `M`. The caller updates it, and a
            refresh rotates it with the basis. An observation then also holds the rotated gradient, `rotated`.
    """

    keeps_momentum: bool

    def rotate(self, state: State, gradient: Tensor) -> Tensor:
        """`G` in the coordinates of the block, (fan_out, fan_in)."""
        ...

    def precondition_rotated(self, state: State, rotated: Tensor) -> Tensor:
        """`P(G)`, given the rotated `G`."""
        ...


def update_average(state: State, name: str, value: Tensor, beta: float) -> None:
    """`X ← β X + (1-β) X̂` in place."""
    state[name].lerp_(value.to(state[name].dtype), 1 - beta)


def update_averages(state: State, observation: State, beta: float) -> None:
    """Move every average in `observation`, and their common `weight`."""
    for name, value in observation.items():
        update_average(state, name, value, beta)
    update_average(state, "weight", torch.ones_like(state["weight"]), beta)


def corrected_average(state: State, name: str) -> Tensor:
    """The bias-corrected average `X / (1-β^t)`; `state["weight"]` holds `1-β^t` as the running average of 1."""
    return state[name] / per_matrix(state["weight"], state[name])
