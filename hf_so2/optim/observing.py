"""What a training loop tells an optimizer of the gradients that it is about to make, and when it gives some up."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_so2.distributed import is_sharded, world
from hf_so2.engine.adaptive import AdaptiveDamping, Loss
from hf_so2.layers import SampledCapture
from hf_so2.layers.sampled_labels import generator_for, sampled_loss
from hf_so2.methods.settings import Settings
from hf_so2.optim.optimizer_state import OptimizerWithCurvature
from hf_so2.optim.skipping import have_no_gradient
from hf_so2.weights.schedule import due


class ObservingOptimizer(OptimizerWithCurvature):
    """An optimizer with curvature that listens to a training loop.

    Attributes:
        settings: the hyperparameters.
    """

    settings: Settings
    _adaptive: AdaptiveDamping | None
    _generator: torch.Generator | None

    @property
    def capturing(self) -> bool:
        """Whether the coming step captures tokens for the curvature statistics; `announce` is of use only then."""
        return self.curvature is not None and bool(self.curvature.capture.due)

    def announce(
        self,
        tokens: int | Tensor | None,
        gradient_scale: float | Tensor,
        row_mask: Tensor | None = None,
        *,
        is_mean: bool = False,
    ) -> None:
        """Name the factor that backward puts on the gradients of the next micro-batch; hardly ever needed.

        Without a call, the loss of the step is taken as the mean over the rows that have one: N is how many predictions
        (`logits`) the loss comes back through or, of a model that shows none, how many rows of each layer.

        Args:
            tokens: how many rows of this micro-batch, on this rank, have a loss; None to have them counted.
            gradient_scale: c, where backward hands out c times the gradient of a row's own loss: `1/N` for a mean over
                the N rows of the whole step, times the world size where the gradients of ranks are averaged, times the
                scale of a loss scaler.
            row_mask: no longer of use: which rows count is seen from their gradients.
            is_mean: whether the loss is besides divided by the number of rows of this micro-batch.
        """
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
        """Take the curvature statistics of `fisher="mc"`; call it between every forward pass and its backward.

        Draws labels from the model's own predictions and sends their loss backward to the outputs of the layers, on
        steps that update the statistics only. Gradients of parameters and torch's random numbers stay as they are, and
        no call of `announce` is needed. With `fisher="empirical"` it does nothing.

        Args:
            logits: (..., classes), with the graph of the forward pass.
            counted: (...), true where a row counts in the training loss; None to go by `loss`.
            row_mask: no longer of use: which rows count is seen from their gradients.
            loss: the training loss, 0-dim; rows count that have a gradient of it. None where all do.
            independent: whether every class is a yes or no of its own, as in multi-label classification.
            seed: of the draws, which also depend on the step and the rank.

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
        """As in torch; what was captured of the gradients that are reset is forgotten with them.

        A forward pass whose backward pass is still to come stays captured.
        """
        super().zero_grad(set_to_none)
        if self.curvature is not None and self.curvature.capture.drop():
            self._forget_draws_and_losses()

    def discard_captures(self) -> None:
        """Forget micro-batches that will not be stepped on, as after an interruption or a retry.

        `zero_grad` does so too, and is enough unless a forward pass has no backward.
        """
        if self.curvature is not None:
            self.curvature.capture.discard()
        self._forget_draws_and_losses()

    def _forget_draws_and_losses(self) -> None:
        self._generator = None
        if self._adaptive is not None:
            self._adaptive.losses = []

    def gradients_are_gone(self) -> bool:
        """Whether all gradients are None or zero, as after `model.zero_grad()`; of sharded ones nobody can tell."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return not any(map(is_sharded, parameters)) and have_no_gradient(parameters)

    @property
    def wants_loss(self) -> bool:
        """Whether adaptive damping measures the coming step and needs `reevaluate_with` before it."""
        return self._adaptive is not None and due(self.steps + 1, self.settings.preconditioner_update_steps)

    def reevaluate_with(self, loss: Loss) -> None:
        """Give adaptive damping the loss of the coming step; call it once per micro-batch, or when `wants_loss` only.

        Args:
            loss: returns the loss of the micro-batch that `backward` is called on, for the parameters as they stand by
                then; without randomness, which would be taken for a change of the loss, so in evaluation mode where
                there is dropout. Several add up, and are averaged over ranks, as their gradients are.
        """
        if self.wants_loss:
            assert self._adaptive is not None
            self._adaptive.losses.append(loss)
