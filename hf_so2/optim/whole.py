"""A step is made completely, or an error says that it was not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hf_so2.distributed import world
from hf_so2.errors import BrokenStepError


class WholeStep:
    """Records whether a step ended half-way. It cannot be undone: a copy to go back to would double the memory.

    Attributes:
        moving: whether weights have begun to move in the current step.
        broken_at: the step that ended half-way, or None.
    """

    def __init__(self) -> None:
        self.moving = False
        self.broken_at: int | None = None

    def require(self) -> None:
        """Refuse to continue from, or to save, a mixture of weights before and after a step.

        Raises:
            BrokenStepError: a step ended half-way.
        """
        if self.broken_at is not None:
            raise BrokenStepError(self.broken_at)

    @contextmanager
    def making(self, step: int) -> Iterator[None]:
        """A context in which step number `step` is made. Ctrl-C waits until the step is made; a second Ctrl-C does not.

        An error in the middle is raised again, with a note that says what state it left.

        Raises:
            BrokenStepError: an earlier step ended half-way.
        """
        self.require()
        self.moving = False
        with _interrupts_held_back():
            try:
                yield
            except BaseException as error:
                if self.moving:
                    self.broken_at = step
                    error.add_note(str(BrokenStepError(step)))
                else:
                    error.add_note(_nothing_moved(step, world()[1]))
                raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    # Only the main thread receives signals. If the handler is not callable, no Python code handles the signal.
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:  # the second Ctrl-C acts at once: the step may be waiting for a dead process
            held.clear()
            handler(number, frame)
        else:
            held.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])


def _nothing_moved(step: int, ranks: int) -> str:
    if ranks == 1:
        return (
            f"step {step} was broken off before any weight had moved; the averages of curvature and momentum may have:"
            " training can go on"
        )
    # The state of the other processes is unknown here. To ask them could mean to wait for one that is gone.
    return (
        f"step {step} was broken off before any weight had moved in this process, one of {ranks}; in others weights may"
        " have, or they are gone: see what they say, and start all of them anew from a checkpoint"
    )
