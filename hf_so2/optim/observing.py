"""What a training loop tells the optimizer: facts about the coming gradients, and which gradients are given up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_so2.distributed import is_sharded, world
from hf_so2.engine.adaptive import AdaptiveDamping, Loss
from hf_so2.errors import ConfigurationError
from hf_so2.layers import SampledCapture
from hf_so2.layers.sampled_labels import generator_for, sampled_loss
from hf_so2.methods.settings import Settings
from hf_so2.optim.optimizer_state import OptimizerWithCurvature
from hf_so2.optim.skipping import have_no_gradient
from hf_so2.weights.schedule import due


class ObservingOptimizer(OptimizerWithCurvature):
    """An optimizer with curvature that takes information from a training loop.

    Attributes:
        settings: the hyperparameters.
    """

    settings: Settings
    _adaptive: AdaptiveDamping | None
    _generator: torch.Generator | None

    @property
    def capturing(self) -> bool:
        """Whether the coming step captures tokens for the curvature statistics. `announce` has an effect only then."""
        return self.curvature is not None and bool(self.curvature.capture.due)

    def announce(
        self,
        tokens: int | Tensor | None,
        gradient_scale: float | Tensor,
        row_mask: Tensor | None = None,
        *,
        is_mean: bool = False,
    ) -> None:
        """State the factor that backward puts on the gradients of the next micro-batch. It is rarely needed.

        Without a call, the loss of the step is assumed to be the mean over the N rows that have a loss. N is the number
        of predictions (`logits`) that the gradient of the loss passes through. If the model shows no predictions, N is
        the number of rows of each layer.

        Args:
            tokens: number of rows of this micro-batch, on this rank, that have a loss; None to count them.
            gradient_scale: c, if backward gives c times the gradient of a row's own loss. It is the product of `1/N`
                for a mean over the N rows of the whole step, the world size if the gradients of ranks are averaged, and
                the scale of a loss scaler.
            row_mask: no longer used: the gradients show which rows count.
            is_mean: whether the loss is also divided by the number of rows of this micro-batch.

        Raises:
            ConfigurationError: a count that is none, or a factor of zero or infinity.
        """
        if not (tokens is None or isinstance(tokens, int | Tensor)):
            raise ConfigurationError("tokens", tokens, "must be a whole number or None")
        if not isinstance(gradient_scale, Tensor) and not (_is_finite(gradient_scale) and gradient_scale):
            raise ConfigurationError("gradient_scale", gradient_scale, "must be a finite number other than 0")
        if self.curvature is not None:
            self.curvature.capture.announce(tokens, gradient_scale, is_mean=is_mean)

    def sample_fisher(
        self,
        logits: Tensor,
        counted: Tensor | None = None,
        row_mask: Tensor | None = None,
        *,
        loss: Tensor | None = None,
        independent: bool = False,
        seed: int = 0,
    ) -> None:
        """Take the curvature statistics of `fisher="mc"`. Call it between every forward pass and its backward pass.

        It draws labels from the model's own predictions and propagates their loss back to the outputs of the layers. It
        does so only on steps that update the statistics. Gradients of parameters and torch's random numbers do not
        change. No call of `announce` is needed. With `fisher="empirical"` it does nothing.

        Args:
            logits: (..., classes), with the graph of the forward pass.
            counted: (...), true where a row counts in the training loss; None to use `loss`.
            row_mask: no longer used: the gradients show which rows count.
            loss: the training loss, 0-dim. A row counts if the loss has a gradient there. None if all rows count.
            independent: whether every class has its own yes or no, as in multi-label classification.
            seed: seed of the draws, which also depend on the step and the rank.

        Raises:
            ConfigurationError: the model runs under reentrant checkpointing.
        """
        if self.curvature is None or not self.capturing or not isinstance(self.curvature.capture, SampledCapture):
            return
        if counted is None and loss is not None:
            counted = self.curvature.capture.rows_with_loss(logits, loss)
        if self._generator is None:
            self._generator = generator_for(seed, self.steps, world()[0], logits.device)
        with torch.enable_grad():
            sampled = sampled_loss(logits, counted, self._generator, independent=independent)
        tokens = logits[..., 0].numel() if counted is None else counted.sum()
        self.announce(tokens, 1.0)
        self.curvature.capture.differentiate(sampled)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. The captures that belong to the reset gradients are discarded too.

        A forward pass stays captured if its backward pass is still to come.
        """
        super().zero_grad(set_to_none)
        if self.curvature is not None and self.curvature.capture.drop():
            self._forget_draws_and_losses()

    def discard_captures(self) -> None:
        """Discard micro-batches for which no step will be made, as after an interruption or a retry.

        `zero_grad` does this too. It is enough, unless a forward pass has no backward pass.
        """
        if self.curvature is not None:
            self.curvature.capture.discard()
        self._forget_draws_and_losses()

    def _forget_draws_and_losses(self) -> None:
        self._generator = None
        if self._adaptive is not None:
            self._adaptive.losses = []

    def gradients_are_gone(self) -> bool:
        """Whether all gradients are None or zero, as after `model.zero_grad()`. False if any parameter is sharded."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return not any(map(is_sharded, parameters)) and have_no_gradient(parameters)

    @property
    def wants_loss(self) -> bool:
        """Whether adaptive damping measures the coming step and needs `reevaluate_with` before it."""
        return self._adaptive is not None and due(self.steps + 1, self.settings.preconditioner_update_steps)

    def reevaluate_with(self, loss: Loss) -> None:
        """Give adaptive damping the loss of the coming step. Call it once per micro-batch, or only when `wants_loss`.

        Args:
            loss: returns the loss of the micro-batch that `backward` is called on, at the parameters' values at the
                time of the call. It must have no randomness, which would look like a change of the loss. A model with
                dropout must be in evaluation mode. Several losses add up and are averaged over ranks, as their
                gradients are.

        Raises:
            ConfigurationError: `loss` cannot be called.
        """
        if not callable(loss):
            raise ConfigurationError("loss", type(loss).__name__, "must be a function that returns the loss")
        if self.wants_loss:
            assert self._adaptive is not None
            self._adaptive.losses.append(loss)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
