"""Train with less memory: norms and gated MLPs of known families keep less for backward (equal results)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from decal.layers.lean import LeanGatedMLP, LeanRMSNorm, lean_of
from decal.model.inject import place


@contextmanager
def lean(model: nn.Module) -> Iterator[int]:
    """Swap the lean forms in for the time of the block; yields how many. The model afterwards is the very same."""
    swapped: list[tuple[str, LeanGatedMLP | LeanRMSNorm]] = []
    for name, module in list(model.named_modules()):
        new = lean_of(module)
        if new is not None:
            new.train(module.training)
            place(model, name, new)
            swapped.append((name, new))
    try:
        yield len(swapped)
    finally:
        for name, new in swapped:
            place(model, name, new.original.train(new.training))
