"""A step that happens whole, or says that it did not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hf_so2.distributed import world
from hf_so2.errors import BrokenStepError


class WholeStep:
    """Watches over the steps of one optimizer: a copy to go back to would double its memory.

    Attributes:
        moving: whether weights have begun to move in the step that is being made.
        broken_at: the step that ended half-way; None as long as none did.
    """

    def __init__(self) -> None:
        self.moving = False
        self.broken_at: int | None = None

    def require(self) -> None:
        """Refuse to go on from, or to save, weights of two steps.

        Raises:
            BrokenStepError: a step ended half-way.
        """
        if self.broken_at is not None:
            raise BrokenStepError(self.broken_at)

    @contextmanager
    def making(self, step: int) -> Iterator[None]:
        """Make step number `step` inside. Ctrl-C waits until it has been made; a second one does not.

        An error in the middle is handed on, with a note that says what it left behind.

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
    # Only the main thread hears of signals; and what is no function here, nobody in Python is waiting for.
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:  # who asks twice, as in a step that waits for a dead process, means now
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
    # What happened to the others is not known here, and asking them could wait for one that is gone.
    return (
        f"step {step} was broken off before any weight had moved in this process, one of {ranks}; in others weights may"
        " have, or they are gone: see what they say, and start all of them anew from a checkpoint"
    )
