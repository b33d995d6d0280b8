"""See each file operation of this process before it happens, so that a test can kill it, or refuse it, just there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")  # audit events of file operations


def operations(run: Path, act: Callable[[int, str], object]) -> None:
    """Call `act` before each file operation under `run` in this process, for good, with its number and its name."""
    count, under = [0], str(run)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in CHANGING and event != "open":
            return
        place = str(arguments[0])
        if not place.startswith(under):
            return
        flags = arguments[2] if event == "open" else None
        if event == "open" and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        count[0] += 1
        act(count[0], f"{event} {os.path.relpath(place, under)}".replace(str(os.getpid()), "PID"))

    sys.addaudithook(hook)
