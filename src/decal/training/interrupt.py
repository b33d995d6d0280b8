"""Ctrl-C and SIGTERM while training: the step under way is finished, a checkpoint is saved, the run can go on later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from decal.errors import RunError
from decal.rundir import RUN

T = TypeVar("T")


class Interrupted(RunError):
    """The user or the machine stopped the run; its checkpoint is saved and the text says how to go on."""

    def __init__(self, *, step: int, run: Path) -> None:
        self.step = step
        self.run = run
        self.resume = f"decal train {run / RUN} --resume"
        super().__init__(f"training was stopped after step {step}, which is saved", fix=f"Go on with: {self.resume}")


class Stop:
    """Whether a signal has asked the loop to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self._at_once or (again and number == signal.SIGINT):  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """Return what `work` returns, or None if a signal came before or meanwhile: it is broken off at once.

        For work that changes nothing and can be done again.
        """
        if self.asked:
            return None
        self._at_once = True
        try:
            return work()
        except KeyboardInterrupt:
            self.asked = True
            return None
        finally:
            self._at_once = False


@contextmanager
def listening() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request in the block. Outside the main thread Python allows no handlers."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
