"""Ctrl-C and SIGTERM, which a machine sends that is taken back: work ends where it can go on from."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from anchorvec.errors import Interrupted
from anchorvec.terminal import say

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """As a context manager: a signal raises Interrupted at once, but inside of `deferred` it is only noted.

    `how_to_go_on` is the message's last part. A second signal is never deferred. Python has signals in the main thread
    alone; in another one they stay what they are.
    """

    def __init__(self, how_to_go_on: str) -> None:
        self.how_to_go_on = how_to_go_on
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The context of work that looks at `received` itself, and ends in a better place."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def stop(self, where: str = "stopped; all that is finished is kept") -> None:
        """Raise Interrupted, which says `where` the work was left, if a signal has been received."""
        if self.received is not None:
            raise Interrupted(f"{where}; to go on: {self.how_to_go_on}", self.received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        first = self.received is None
        self.received = number
        if self._deferred and first:
            name = _SIGNALS[signal.Signals(number)]
            say(f"{name}: a checkpoint is written after this step; once more, and it ends at once")
        else:
            self.stop()
