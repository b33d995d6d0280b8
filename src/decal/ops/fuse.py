"""Elementwise functions that run as one kernel on a CUDA card: torch.compile there, the very function everywhere else.

A compiled region computes what its function says, in fp32 between reading and writing: its result differs from the
function's own by roundings in between, never in kind. Where compiling fails (no C compiler, no Triton), one line says
so and the function itself runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from decal.ops import select

P = ParamSpec("P")
R = TypeVar("R")
Choice = Literal["off", "plain", "compiled"]


class Witness(Protocol):
    """Whoever counts what runs (planning/traced.py): it is shown each region as the one kernel that it will be."""

    def kernel(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        """Return what the function makes of its arguments, written over if its name ends with _; or a likeness of it.

        A likeness is without values, where the arguments are.
        """
        ...


_forced: Choice | None = None
_witness: Witness | None = None
_broken: set[str] = set()


def on(device: torch.device) -> bool:
    """Return whether regions, and what is built of them, run on `device` in the place of the general path."""
    return select.habits(device) == "cuda" if _forced is None else _forced != "off"


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Inside the block and on any device: no regions, or regions as the very functions, or compiled."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


@contextmanager
def seen_by(witness: Witness) -> Iterator[None]:
    """Inside the block regions run as the very functions, and `witness` counts each as one kernel."""
    global _witness
    before, _witness = _witness, witness
    try:
        yield
    finally:
        _witness = before


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda" if _forced is None else _forced == "compiled"


def region(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, compiled on a card; its first argument must be a tensor."""
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        assert isinstance(first, Tensor), "a region's first argument is a tensor"
        if _witness is not None and on(first.device):
            return _witness.kernel(function, args, kwargs)
        if function.__name__ in _broken or not _compiles(first.device):
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function, fullgraph=True))
        try:
            return compiled[0](*args, **kwargs)
        except _failures() as error:
            _broken.add(function.__name__)
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logging.getLogger("decal").warning(
                "%s could not be compiled and runs in plain PyTorch, with equal results but slower (%s)",
                function.__name__,
                first_line[:120],
            )
            return function(*args, **kwargs)

    return run


def _failures() -> tuple[type[Exception], ...]:
    """Return what torch.compile raises when it is the compiler that failed (nothing has been computed then)."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # loaded by the first compilation
    from torch._inductor.exc import InductorError

    return TorchDynamoException, FailOnRecompileLimitHit, InductorError
