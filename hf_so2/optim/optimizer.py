"""The one step pipeline that every method plugs into.

statistics → reduce over ranks → refresh → momentum → precondition → norm control → decoupled weight decay → apply
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_so2.distributed import is_sharded, local, world
from hf_so2.errors import ConfigurationError
from hf_so2.layers import SampledCapture
from hf_so2.optim.adaptive import AdaptiveDamping, Loss
from hf_so2.optim.coverage import CoverageReport, warn_of_uncaptured
from hf_so2.optim.fallback import first_order_step
from hf_so2.optim.optimizer_state import OptimizerWithCurvature
from hf_so2.optim.sampled_labels import generator_for, sampled_loss
from hf_so2.optim.schedule import due
from hf_so2.optim.second_order import second_order_updates, with_gradients
from hf_so2.optim.settings import Settings
from hf_so2.optim.skipping import SkippedSteps, are_in_range, gradients_and_limits
from hf_so2.optim.statistics import Curvature
from hf_so2.optim.telemetry import LEVELS, StepRecord, report
from hf_so2.optim.whole import WholeStep


class SecondOrderOptimizer(OptimizerWithCurvature):
    """Second-order updates for the layers of a model and first-order ones for the rest, in one optimizer.

    Built by `hf_so2.build_optimizer`. Beside torch's own keys a parameter group holds `algorithm` (`adamw`, `sgd` or
    the curvature method), `param_names`, and the constants of its first-order algorithm; `lr` and `weight_decay` carry
    the width multipliers already, so that schedulers and resumes need to know nothing of μP.

    Args:
        groups: parameter groups with the keys that `hf_so2.optim.build` writes.
        settings: the hyperparameters.
        curvature: statistics and preconditioners, or None for a first-order method.
        report: what was decided for every parameter.

    Attributes:
        steps: how many updates have been made.
        curvature_in_state_dict: whether `state_dict()` holds the curvature. On by default, so that a plain loop saves
            all there is; a Trainer that writes it to a file of its own turns it off.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        settings: Settings,
        curvature: Curvature | None,
        report: CoverageReport,
    ) -> None:
        self.settings, self.curvature, self._report = settings, curvature, report
        self.steps, self._skipped, self._whole = 0, SkippedSteps(), WholeStep()
        self.curvature_in_state_dict = True
        self._generator: torch.Generator | None = None
        self._record = StepRecord()
        self._adaptive = AdaptiveDamping(curvature) if curvature is not None and settings.adaptive_damping else None
        super().__init__(groups, {"lr": settings.lr, "weight_decay": settings.weight_decay})
        if curvature is not None:
            curvature.capture.watch = weakref.ref(self)
        self._schedule_capture()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, for groups that `hf_so2.optim.build` makes.

        Raises:
            ConfigurationError: any other group: nobody has decided what updates it and at which rates.
        """
        if "algorithm" not in param_group:
            entries = param_group["params"]
            entries = [entries] if isinstance(entries, Tensor) else list(entries)
            names = [entry[0] if isinstance(entry, tuple) else tuple(entry.shape) for entry in entries]
            allowed = "cannot be added: call build_optimizer anew once all that is to be trained requires a gradient"
            raise ConfigurationError("param_group", names, allowed)
        super().add_param_group(param_group)

    def coverage(self) -> CoverageReport:
        """Which parameters get second-order updates, which the fallback, and why; `str()` of it is a table.

        Once steps have been made, a weight that was chosen for preconditioning but has never been captured is listed
        under the fallback that updates it.
        """
        if self.steps == 0 or self.curvature is None:
            return self._report
        chosen = [*self.curvature.layers, *self.curvature.weight_of_bias]
        uncaptured = {name for name in chosen if not self.curvature.preconditions(name)}
        return self._report.moved_to_fallback(uncaptured)

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient, or what the state would keep of it, was not finite."""
        return self._skipped.total

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

    def observe_next_step(self) -> None:
        """Have the coming step record for `telemetry` what only the step itself can tell: two norms per layer."""
        self._record.enabled = True

    def telemetry(self, by: str = "role") -> dict[str, float]:
        """How curvature stands after the last step, for a log; empty for a first-order method.

        Keys are `curvature/<role or layer>/<quantity>`: `trace`, `damping` (ρ) and `condition` of each factor, with
        `_A`, `_B`, `_L` or `_R` where a block has one for each side (SOAP damps none of its two, and Muon has none at
        all; a weight that is cut into blocks has the sum of their traces, the mean of ρ and the largest condition
        number), and, where `observe_next_step` was called before the step, `update_rms`, the root mean square of the
        change of a weight; besides `curvature/kl_clip_factor` under that norm control, and `curvature/refresh_seconds`,
        `curvature/failed_refreshes`, `curvature/dropped_statistics`, `curvature/overflowed_updates` and
        `curvature/skipped_steps`. This call waits for the device. With a `gradient_worker_fraction` below 1 it is a
        collective: every rank has to make it.

        Args:
            by: `role` (`attention`, `mlp`, …: means over layers, of condition numbers the largest) or `layer`.

        Raises:
            ConfigurationError: another `by`.
        """
        if by not in LEVELS:
            raise ConfigurationError("by", by, f"must be one of {', '.join(LEVELS)}")
        if self.curvature is None:
            return {}
        numbers = report(self.curvature, self._record, self.steps, by)
        factor = self._record.norm_factor if self._record.step == self.steps else None
        if factor is not None and self.settings.norm_control == "kl_clip":
            numbers["curvature/kl_clip_factor"] = float(factor)
        if self._adaptive is not None:
            numbers |= self._adaptive.telemetry()
        return numbers | {"curvature/skipped_steps": self.skipped_steps}

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
        parameters = sorted((p for group in self.param_groups for p in group["params"]), key=Tensor.numel)
        if any(p.grad is not None and bool(local(p.grad).any()) for p in parameters):  # mostly the first and smallest
            return False
        return not any(map(is_sharded, parameters))

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update. With a non-finite gradient nothing moves, the step is counted in `skipped_steps`.

        Raises:
            TrainingDivergedError: too many skipped steps, or failed decompositions, in a row.
            BrokenStepError: an earlier step was broken off half-way, and no state has been loaded since.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_creates_state():
            self._apply_first_order()
            return loss
        if not are_in_range(*gradients_and_limits(self.param_groups, self.curvature, self.settings.norm_control)):
            self.discard_captures()
            self._skipped.add(self.steps + 1)
            return loss
        adaptive = self._adaptive if self.wants_loss else None
        if adaptive is not None and with_gradients(self.param_groups, adaptive.curvature.layers):
            adaptive.require_losses()
        with self._whole.making(self.steps + 1):
            try:
                self._make_step()
            except BaseException:
                if not self._whole.moving:
                    self.steps -= 1
                    self.discard_captures()
                raise
        return loss

    def _make_step(self) -> None:
        self._generator = None
        self.steps += 1
        self._skipped.in_a_row = 0
        self._update_curvature()
        self._apply_second_order()
        if self._adaptive is not None:
            self._adaptive.losses = []
        self._whole.moving = True
        self._apply_first_order()
        self._schedule_capture()

    def _only_creates_state(self) -> bool:
        """Whether this is the step at rate 0 with gradients of zero by which torch.distributed.checkpoint has state
        made before it loads or saves any; it is not one of the training.
        """
        if self.steps or any(float(group["lr"]) for group in self.param_groups):
            return False
        return not any(bool(local(p.grad).any()) for g in self.param_groups for p in g["params"] if p.grad is not None)

    def _update_curvature(self) -> None:
        if self.curvature is None:
            return
        weights = with_gradients(self.param_groups, self.curvature.layers)
        self.curvature.update(weights, self.steps)
        if self.steps == 1:
            unseen = {name: weight for name, weight in weights.items() if not self.curvature.layers[name].updates}
            warn_of_uncaptured(
                name for name, weight in unseen.items() if weight.grad is not None and local(weight.grad).any()
            )
        self.curvature.refresh(self.steps)

    def _schedule_capture(self) -> None:
        if self.curvature is not None:
            self.curvature.prepare(self.steps + 1)

    def _after_loading(self) -> None:
        if self.curvature is not None and self._adaptive is None:
            self.curvature.damping_factor = 1.0  # what adaptive damping had learned is nobody's to change now
        self._schedule_capture()

    def _apply_second_order(self) -> None:
        if self.curvature is None:
            return
        found = {name: (group, parameter) for group, name, parameter in self._parameters(second_order=True)}
        updates = second_order_updates(found, self.state, self.curvature, self.settings, self._record, self.steps)
        if found and self._adaptive is not None and due(self.steps, self.settings.preconditioner_update_steps):
            made = list(updates)
            self._whole.moving = True
            self._adaptive.apply(made, self.steps)
            return
        for update in updates:
            self._whole.moving = True
            update.apply()

    def _apply_first_order(self) -> None:
        for group in self.param_groups:
            entries = [(p, self.state[p]) for _, _, p in self._parameters(second_order=False, only=group)]
            if entries:
                parameters, states = zip(*entries, strict=True)
                first_order_step(group, parameters, states, beside_second_order=self.curvature is not None)

    def _parameters(
        self, *, second_order: bool, only: dict[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """(group, name, parameter) of everything with a gradient that gets this kind of update in this step.

        A weight chosen for preconditioning whose module has not been called (a functional use, an idle expert, a hook
        that never fired) has no preconditioner yet and is updated by the fallback.
        """
        for group in [only] if only is not None else self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                is_preconditioned = self.curvature is not None and self.curvature.preconditions(name)
                if parameter.grad is not None and is_preconditioned == second_order:
                    yield group, name, parameter
