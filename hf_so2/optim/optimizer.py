"""The one step pipeline that every method plugs into.

statistics → reduce over ranks → refresh → momentum → precondition → norm control → decoupled weight decay → apply
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_so2.distributed import local
from hf_so2.engine.adaptive import AdaptiveDamping
from hf_so2.engine.fallback import first_order_step
from hf_so2.engine.second_order import second_order_updates, with_gradients
from hf_so2.engine.statistics import Curvature
from hf_so2.engine.step_record import StepRecord
from hf_so2.errors import ConfigurationError
from hf_so2.methods.settings import Settings
from hf_so2.optim.coverage import CoverageReport, warn_of_uncaptured
from hf_so2.optim.observing import ObservingOptimizer
from hf_so2.optim.skipping import SkippedSteps, are_in_range, gradients_and_limits, have_no_gradient
from hf_so2.optim.telemetry import LEVELS, report
from hf_so2.optim.whole import WholeStep
from hf_so2.weights.schedule import due


class SecondOrderOptimizer(ObservingOptimizer):
    """Second-order updates for the layers of a model and first-order ones for the rest, in one optimizer.

    `hf_so2.build_optimizer` builds it. Besides torch's own keys, a parameter group has `algorithm` (`adamw`, `sgd` or
    the curvature method), `param_names`, and the constants of its first-order algorithm. `lr` and `weight_decay`
    already include the width multipliers. Schedulers and resumed runs thus need no knowledge of μP.

    Args:
        groups: parameter groups with the keys that `hf_so2.optim.build` writes.
        settings: the hyperparameters.
        curvature: statistics and preconditioners, or None for a first-order method.
        report: the decision for every parameter.

    Attributes:
        steps: number of updates made.
        curvature_in_state_dict: whether `state_dict()` includes the curvature. It is on by default, so that a plain
            loop saves everything. A Trainer that writes the curvature to its own file turns it off.
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
            ConfigurationError: any other group. Its algorithm and its learning rates are not decided.
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

        After the first steps, a weight that was chosen for preconditioning but was never captured is listed under the
        fallback that updates it.
        """
        if self.steps == 0 or self.curvature is None:
            return self._report
        chosen = [*self.curvature.layers_of, *self.curvature.weight_of_bias]
        uncaptured = {name for name in chosen if not self.curvature.preconditions(name)}
        return self._report.moved_to_fallback(uncaptured)

    @property
    def skipped_steps(self) -> int:
        """Number of steps left out because a gradient was not finite, or would have made the state so."""
        return self._skipped.total

    def observe_next_step(self) -> None:
        """Let the coming step record values for `telemetry` that only the step itself knows: two norms per layer."""
        self._record.enabled = True

    def telemetry(self, by: str = "role") -> dict[str, float]:
        """The curvature after the last step, as numbers for a log; empty for a first-order method.

        Keys are `curvature/<role or layer>/<quantity>`. The quantities are `trace`, `damping` (ρ) and `condition` of
        each factor, with the suffix `_A`, `_B`, `_L` or `_R` if a block has a factor for each side. SOAP damps neither
        of its two factors, and Muon has none. A weight that is cut into blocks has the sum of their traces, the mean of
        ρ and the largest condition number. If `observe_next_step` was called before the step, there is also
        `update_rms`, the root mean square of the change of a weight.

        Other keys are `curvature/refresh_seconds`, `curvature/failed_refreshes`, `curvature/dropped_statistics`,
        `curvature/overflowed_updates`, `curvature/skipped_steps`, and under the KL clip `curvature/kl_clip_factor`.

        This call waits for the device. With a `gradient_worker_fraction` below 1 it is a collective: every rank has to
        make it.

        Args:
            by: `layer`, or `role` (`attention`, `mlp`, …) for means over layers, and the largest condition number.

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update. If a gradient is not finite, nothing moves and the step counts in `skipped_steps`.

        Raises:
            TrainingDivergedError: too many skipped steps, or failed decompositions, in a row.
            BrokenStepError: an earlier step was interrupted half-way, and no state has been loaded since.
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
        if adaptive is not None and with_gradients(self.param_groups, adaptive.curvature):
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
        """Whether this step only creates state, and is no training step.

        torch.distributed.checkpoint makes such a step, with learning rate 0 and gradients of zero, before it loads or
        saves state.
        """
        if self.steps or any(float(group["lr"]) for group in self.param_groups):
            return False
        return have_no_gradient(parameter for group in self.param_groups for parameter in group["params"])

    def _update_curvature(self) -> None:
        if self.curvature is None:
            return
        weights = with_gradients(self.param_groups, self.curvature)
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
            self.curvature.damping_factor = 1.0  # without adaptive damping, no step would change a loaded factor
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
                warmup_steps = self.settings.fallback_warmup_steps or 1
                first_order_step(
                    group,
                    parameters,
                    states,
                    beside_second_order=self.curvature is not None,
                    warmup_steps=warmup_steps,
                )

    def _parameters(
        self, *, second_order: bool, only: dict[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """(group, name, parameter) of everything with a gradient that gets this kind of update in this step.

        A weight that was chosen for preconditioning has no preconditioner until its module has been called. The
        fallback updates it until then (a functional use, an idle expert, a hook that never fired).
        """
        for group in [only] if only is not None else self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                is_preconditioned = self.curvature is not None and self.curvature.preconditions(name)
                if parameter.grad is not None and is_preconditioned == second_order:
                    yield group, name, parameter
