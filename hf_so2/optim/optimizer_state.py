"""The state that an optimizer with curvature saves and loads."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import torch

from hf_so2.engine.statistics import Curvature
from hf_so2.optim.skipping import SkippedSteps
from hf_so2.optim.whole import WholeStep

logger = logging.getLogger(__name__)


class OptimizerWithCurvature(torch.optim.Optimizer):
    """torch's optimizer. Besides torch's own state it has the curvature and the counters of steps.

    Attributes:
        curvature: statistics and preconditioners, or None for a first-order method.
        steps: number of updates made.
        curvature_in_state_dict: whether `state_dict()` includes the curvature. It is on by default, so that a plain
            loop saves everything. A Trainer that writes the curvature to its own file turns it off.
    """

    curvature: Curvature | None
    steps: int
    curvature_in_state_dict: bool
    _skipped: SkippedSteps
    _whole: WholeStep

    def _after_loading(self) -> None:
        """Update everything that depends on the loaded counters and curvature."""
        raise NotImplementedError

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a SecondOrderOptimizer cannot be copied or pickled, since it watches the modules of one model: save its"
            " state_dict(), call build_optimizer for the other model and load it there"
        )

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the key `curvature` besides `state` and `param_groups`.

        With a `gradient_worker_fraction` below 1 it is a collective: every rank has to call it, and every rank gets the
        complete state.

        Raises:
            BrokenStepError: a step was interrupted half-way. Its state must not replace a good checkpoint.
        """
        self._whole.require()
        state = super().state_dict()
        if self.curvature_in_state_dict:
            state["curvature"] = self.curvature_state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. A dictionary without `curvature` is refused, unless the curvature is loaded separately.

        Raises:
            ValueError: the saved state does not fit the model, or has no curvature.
        """
        if "curvature" not in state_dict and self.curvature_in_state_dict:
            raise ValueError(
                "state_dict has no key 'curvature': it was not saved by this optimizer's state_dict(), or by"
                " torch.distributed.checkpoint, which leaves that out; save curvature_state_dict() beside it, and set"
                " curvature_in_state_dict = False before loading"
            )
        self._take_groups_of(state_dict["param_groups"])
        super().load_state_dict(state_dict)
        if "curvature" in state_dict:
            self.load_curvature_state_dict(state_dict["curvature"])

    def _take_groups_of(self, saved: list[dict[str, Any]]) -> None:
        """Group the parameters as in a saved state. Other hyperparameters may have grouped them differently.

        The saved hyperparameters stay in use, as in torch. A warning names new ones that differ.
        """
        parameters = {
            n: p for group in self.param_groups for n, p in zip(group["param_names"], group["params"], strict=True)
        }
        names = [group.get("param_names", []) for group in saved]
        if sorted(name for group in names for name in group) != sorted(parameters):
            return  # the state of another model: torch raises the error
        before = {name: group for group in self.param_groups for name in group["param_names"]}
        for group in saved:
            self._warn_of_other_settings(group, before[group["param_names"][0]])
        if names != [group["param_names"] for group in self.param_groups]:
            self.param_groups[:] = [
                {**group, "params": [parameters[name] for name in group["param_names"]]} for group in saved
            ]

    def _warn_of_other_settings(self, saved: dict[str, Any], given: dict[str, Any]) -> None:
        rate = "initial_lr" if "initial_lr" in saved else "lr"  # with a schedule: the learning rate that it multiplies
        for key in (rate, "weight_decay", "momentum", "betas", "eps", "fallback_lr_ratio"):
            if key in saved and key in given and _plain(saved[key]) != _plain(given[key]):
                logger.warning(
                    "%s: the saved %s=%s goes on, not the %s given now",
                    saved["algorithm"],
                    key.removeprefix("initial_"),
                    saved[key],
                    given[key],
                )

    def curvature_state_dict(self) -> dict[str, Any]:
        """The state that torch's own cannot hold: step counters and the layers' statistics, in their own dtype.

        It is the same on every rank. It loads at any number of ranks and any `gradient_worker_fraction`. With a
        fraction below 1 it is a collective: every rank has to call it.
        """
        self._whole.require()
        counters = {
            "steps": self.steps,
            "skipped_steps": self._skipped.total,
            "in_a_row": self._skipped.in_a_row,
        }
        return {**counters, "curvature": self.curvature.state_dict() if self.curvature is not None else {}}

    def load_curvature_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `curvature_state_dict` returned.

        Raises:
            ValueError: the saved layers are not those of this model, or it is another kind of state.
        """
        expected = {"steps", "skipped_steps", "in_a_row", *(["curvature"] if self.curvature is not None else [])}
        if not expected <= set(state):
            missing = ", ".join(sorted(expected - set(state)))
            raise ValueError(f"state has no {missing}: it is not what curvature_state_dict() returns")
        if self.curvature is not None:
            self.curvature.load_state_dict(state["curvature"])
        self.steps = int(state["steps"])
        self._skipped = SkippedSteps(int(state["skipped_steps"]), int(state["in_a_row"]))
        self._whole.broken_at = None
        self._after_loading()


def _plain(value: Any) -> Any:
    """The value in a form that can be compared. A saved pair may have become a list."""
    return tuple(value) if isinstance(value, list) else value
