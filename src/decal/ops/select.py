"""Which implementation of an operation runs: plain PyTorch everywhere, compiled loops on a CPU, Triton on a CUDA card.

Every kernel equals its PyTorch reference bit for bit, or says where it may not; the tests force each in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

Kind = Literal["reference", "numba", "triton", "shapes"]  # shapes: tensors without values, on which nothing is computed

_forced: Kind | None = None
_habits: str | None = None


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


@cache
def _has(library: str) -> bool:
    found = find_spec(library) is not None
    if not found:
        extra = "cpu" if library == "numba" else "gpu"
        logging.getLogger("decal").warning(
            "%s is not installed: 4-bit weights are decoded in plain PyTorch, with equal results but many times slower "
            "(pip install 'decal[%s]')",
            library,
            extra,
        )
    return found
