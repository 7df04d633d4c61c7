"""Where the phases of a step are in the pipeline. They are timed from outside, so that a normal step pays nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from hf_so2.benchmark.stopwatch import Stopwatch
from hf_so2.engine import norm_control
from hf_so2.optim import SecondOrderOptimizer

FORWARD_BACKWARD, APPLY = "forward+backward", "apply"
PHASES = (FORWARD_BACKWARD, "capture", "reduce", "average", "refresh", "precondition", "norm control", APPLY)
"""`average` moves the running averages of the statistics; `apply` is the rest of `step`: momentum, weight decay, the
update itself and AdamW for what is not preconditioned."""


@contextmanager
def phases_timed(optimizer: SecondOrderOptimizer, stopwatch: Stopwatch) -> Iterator[None]:
    """Counts the phases inside backward and `step` while the context lasts; a first-order method has none."""
    with ExitStack() as stack:
        for owner, attribute, phase in _places(optimizer):
            timed = stopwatch.around(phase, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        controls = {
            name: replace(control, apply=stopwatch.around("norm control", control.apply))
            for name, control in norm_control.NORM_CONTROLS.items()
        }
        stack.enter_context(mock.patch.dict(norm_control.NORM_CONTROLS, controls))
        yield


def _places(optimizer: SecondOrderOptimizer) -> list[tuple[Any, str, str]]:
    """(object, attribute, phase) of the functions that make up each phase."""
    curvature = optimizer.curvature
    if curvature is None:
        return []
    return [
        (curvature.capture, "_sum", "capture"),
        (curvature.capture, "_reached", "capture"),
        (curvature.sharing, "sum_statistics", "reduce"),
        (curvature.sharing, "send_preconditioners", "reduce"),
        (curvature.sharing, "send_updates", "reduce"),
        (curvature, "update", "average"),
        (curvature, "refresh", "refresh"),
        *(
            (block, name, "precondition")
            for block in {type(layer.block) for layer in curvature.layers.values()}
            for name in ("precondition", "precondition_rotated")
            if hasattr(block, name)
        ),
    ]
