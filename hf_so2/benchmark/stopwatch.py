"""Times nested phases without double counting: each phase's own seconds, less those of the phases inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class _Span:
    phase: str
    start: Any
    end: Any = None
    inner: list[_Span] = field(default_factory=list)


class Stopwatch:
    """Measures phases on the device that does the work: by events on a GPU, by the process's clock elsewhere.

    Events are read in `take`, so that nothing waits for the GPU while a step runs.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._finished: list[_Span] = []
        self._open: list[_Span] = []

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Counts what runs inside towards `phase`, unless a span within it says otherwise."""
        span = _Span(phase, self._mark())
        (self._open[-1].inner if self._open else self._finished).append(span)
        self._open.append(span)
        try:
            yield
        finally:
            self._open.pop()
            span.end = self._mark()

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with every call counted towards `phase`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(phase):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; they add up to the time spent in outermost spans."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        pending, self._finished = self._finished, []
        while pending:
            span = pending.pop()
            own = self._elapsed(span) - sum(self._elapsed(inner) for inner in span.inner)
            seconds[span.phase] = seconds.get(span.phase, 0.0) + own
            pending += span.inner
        return seconds

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _elapsed(self, span: _Span) -> float:
        if self._device.type != "cuda":
            return float(span.end - span.start)
        return float(span.start.elapsed_time(span.end)) / 1000
