"""Sizes of memory as people write them. Importing this file costs no torch."""

from __future__ import annotations

import re

from decal.errors import ConfigError

UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12, "g": 2**30, "m": 2**20}


def read(text: str, option: str = "--gpu") -> int:
    """Return the bytes of `24GiB`, `24 GiB`, `80GB`; a number alone is GiB. Raises ConfigError for other texts."""
    match = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?)\s*([a-zA-Z]*)\s*", text)
    number, unit = (match[1].replace(",", "."), match[2].lower()) if match else ("0", "")
    size = float(number) * UNITS.get(unit or "gib", 0)
    if size <= 0:
        raise ConfigError(
            f"{option} is not a size of memory",
            got=repr(text),
            fix=f"Write {option} 24GiB (2^30 bytes) or {option} 24GB (10^9 bytes).",
        )
    return int(size)


def gib(size: float) -> str:
    """Return a size in GiB, with as many digits as matter."""
    value = size / 2**30
    return f"{value:,.2f}" if value < 99.995 else f"{value:,.1f}"


def unit(largest: float) -> str:
    """Return the unit in which sizes up to `largest` are told: MiB below 1 GiB."""
    return "GiB" if largest >= 2**30 else "MiB"


def number(size: float, unit: str) -> str:
    """Return a size in a unit of `unit`, without it."""
    return gib(size) if unit == "GiB" else f"{size / 2**20:,.1f}"


def told(size: float) -> str:
    """Return a size with its unit."""
    return f"{number(size, unit(size))} {unit(size)}"
