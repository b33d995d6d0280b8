"""What `decal generate` and `decal chat` share: the model with its adapters, loaded while a person waits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decal.cli import console
from decal.errors import DecalError

if TYPE_CHECKING:
    from decal.recipes.compare import Variants


def load(model: str | None, adapters: Sequence[str], *, device: str | None) -> Variants:
    """Load with a word to the waiting, and print what had to be assumed."""
    if model is None and not adapters:
        raise DecalError("neither a model nor an adapter is given", fix="Give --adapter, --model, or both.")
    for adapter in adapters:
        if Path(adapter).is_absolute() and not Path(adapter).is_dir():  # seen before torch is loaded
            raise DecalError("no such adapter folder", got=adapter, fix="Check the path.")
    with console.working("loading the model"):
        from decal.recipes import compare

        variants = compare.load(model, adapters, device=device)
    for text in variants.prompts.notes:
        console.note(f"note: {text}")
    return variants
