"""Read what may be damaged: JSON that means one thing only, and one plain error for whatever else a bad file raises."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decal.errors import DecalError

LONGEST = 90  # characters of another library's complaint, so that the line with it fits a terminal


@contextmanager
def reading(what: str, place: object, *, fix: str, kind: type[DecalError] = DecalError) -> Iterator[None]:
    """Turn whatever a damaged file makes the libraries in the block raise into one error that names the file.

    They raise anything, panics of Rust included. Errors of our own and a full memory go through as they are.
    """
    try:
        yield
    except (DecalError, MemoryError):
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of the Rust libraries; it is no Exception
        if not (panic or isinstance(error, Exception)) or "out of memory" in str(error).lower():
            raise
        raise kind(f"{what} ({because(error)})", got=place, fix=fix) from error


def because(error: BaseException) -> str:
    """Return another library's error as one short line: its kind and the beginning of what it says."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return one_line(f"{type(error).__name__}: {text}", LONGEST).rstrip(".: ")


def one_line(text: str, longest: int) -> str:
    """Return a text of unknown origin for an error: one line, cut after a word, nothing that moves a cursor."""
    line = " ".join(text[: 4 * longest].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    if len(line) <= longest:
        return line
    words = line[: longest + 1].rpartition(" ")[0]  # a cut within a word reads like another word
    return f"{words if len(words) > longest // 2 else line[:longest].rstrip()} ..."


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; ValueError for one that is none, or that means different things to others."""
    return parse_json(file.read_bytes().decode("utf-8"))


def parse_json(text: str) -> Any:
    """Return the value that a text means. ValueError for a key that stands twice, and for nesting beyond sense."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return found
