"""See each file operation of this process before it happens, so that a test can kill it, or refuse it, just there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")  # audit events of file operations


class NoMount(Exception):
    """There is no right to mount a file system here."""


Act = Callable[[int, str], object]
_WATCHED: list[tuple[str, Act, list[int]]] = []  # the folder, what is called, how often it was


@contextmanager
def seen(run: Path, act: Act) -> Iterator[None]:
    """Call `act` before each file operation under `run` in this process, with its number and its name."""
    if not _HOOKED:
        _HOOKED.append(True)
        sys.addaudithook(_hook)  # for good: Python takes none back
    _WATCHED.append((str(run), act, [0]))
    try:
        yield
    finally:
        _WATCHED.pop()


_HOOKED: list[bool] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _WATCHED or (event not in CHANGING and event != "open"):
        return
    under, act, count = _WATCHED[-1]
    place = str(arguments[0])
    if not place.startswith(under):
        return
    flags = arguments[2] if event == "open" else None
    if event == "open" and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    count[0] += 1
    act(count[0], f"{event} {os.path.relpath(place, under)}".replace(str(os.getpid()), "PID"))


@contextmanager
def refusing(run: Path, *, after: int, number: int) -> Iterator[list[str]]:
    """Let every file operation under `run` after the first `after` ones fail as on a disk that is full or read-only.

    A full disk (ENOSPC) still renames and deletes; a read-only one (EROFS) or one that others own (EACCES) does
    nothing. Yields the names of what was refused. The writes of libraries in Rust are not seen: `small_files` and a
    real file system see to them.
    """
    refused: list[str] = []

    def act(count: int, name: str) -> None:
        grows, tree = name.startswith(("open", "os.mkdir")), name.startswith("shutil.rmtree")
        if count > after and (grows or number != errno.ENOSPC) and not tree:  # which deletes what is in it one by one
            refused.append(name)
            raise OSError(number, os.strerror(number))

    with seen(run, act):
        yield refused


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of any file fail in this process, whatever language does it: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a real file system of `size` bytes in memory; NoMount where that is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        raise NoMount
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=True)
