"""How numbers are written in sentences. Importing this file costs nothing."""

from __future__ import annotations

IRREGULAR = {"matrix": "matrices", "entry": "entries"}


def counted(number: int, thing: str) -> str:
    """Return `1 row`, `2,048 rows`."""
    return f"{number:,} {thing if number == 1 else IRREGULAR.get(thing, f'{thing}s')}"
