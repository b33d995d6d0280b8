"""Import much at once: torch, transformers, and what they bring."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """Import inside the block with the collector at rest, which then leaves alone what was imported.

    Else it looks through the libraries' objects again and again, for a fifth of the time that importing takes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
