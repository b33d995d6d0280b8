"""Ctrl-C and SIGTERM while training: the step under way is finished, a checkpoint is saved, the run can go on later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from decal.errors import RunError
from decal.rundir import RUN


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

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.asked = True


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
