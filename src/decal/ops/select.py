"""Which implementation of an operation runs: plain PyTorch everywhere, compiled loops on a CPU, Triton on a CUDA card.

Every kernel equals its PyTorch reference bit for bit, or says where it may not; the tests force each in turn. One that
cannot be compiled on this machine is named once, and its reference runs.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch

R = TypeVar("R")
Kind = Literal["reference", "numba", "triton", "shapes"]  # shapes: tensors without values, on which nothing is computed

_forced: Kind | None = None
_habits: str | None = None
_broken: set[str] = set()


def kind(device: torch.device) -> Kind:
    """Return what runs on `device`."""
    if _forced is not None:
        return _forced
    if device.type == "cuda":
        return "triton" if _has("triton") else "reference"
    return "numba" if device.type == "cpu" and _has("numba") else "reference"


@contextmanager
def forced(choice: Kind) -> Iterator[None]:
    """Run `choice` inside the block, on any device (Triton on a CPU needs TRITON_INTERPRET=1 from the start)."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def habits(device: torch.device) -> str:
    """Return the type of device whose limits and sizes are kept to: `device`'s own, but for a plan (see `planned`)."""
    return device.type if _habits is None else _habits


@contextmanager
def planned(device_type: str) -> Iterator[None]:
    """Inside the block take the ways of `device_type` on tensors without values, which all lie on the CPU."""
    global _habits
    before, _habits = _habits, device_type
    try:
        with forced("shapes"):
            yield
    finally:
        _habits = before


class NotCompiled(Exception):
    """A kernel cannot be compiled on this machine. Nothing has run."""


def tried(name: str, kernel: Callable[[], R]) -> R:
    """Return what a kernel returns. Raises NotCompiled, and says so the first time."""
    if name in _broken:
        raise NotCompiled(name)
    try:
        return kernel()
    except Exception as error:
        if not _cannot_compile(error):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
    _broken.add(name)
    logging.getLogger("decal").warning(
        "the kernel %s could not be compiled and runs in plain PyTorch, with equal results but slower (%s)",
        name,
        said[0][:120],
    )
    raise NotCompiled(name)


def _cannot_compile(error: Exception) -> bool:
    """Whether it comes from compiling: Triton's own errors, a missing or failing C compiler, a launcher not loaded."""
    if not installed("triton"):
        return False
    from triton.errors import TritonError
    from triton.runtime.errors import InterpreterError

    if isinstance(error, TritonError):
        return not isinstance(error, InterpreterError)
    if isinstance(error, subprocess.CalledProcessError | FileNotFoundError):
        return True
    return type(error) is RuntimeError and ("C compiler" in str(error) or "newly compiled" in str(error))


def installed(library: str) -> bool:
    return find_spec(library) is not None


@cache
def _has(library: str) -> bool:
    found = installed(library)
    if not found:
        wanted = {"numba": "'decal[cpu]'"}.get(library, library)
        logging.getLogger("decal").warning(
            "%s is not installed: 4-bit weights are decoded in plain PyTorch, with equal results but many times slower "
            "(pip install %s)",
            library,
            wanted,
        )
    return found
