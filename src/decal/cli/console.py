"""How decal talks: results to stdout, progress and errors to stderr, plain text where there is no terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from decal.errors import DecalError

PIPE_WIDTH = 160  # columns of a table that no terminal limits


def out() -> Console:
    """The console of results. Made anew at each call, so that a redirected stdout is respected."""
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)


def err() -> Console:
    """The console of progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def say(text: str, style: str | None = None) -> None:
    """Print a result. The text is taken as it is (no markup) and never broken but by the terminal."""
    out().print(Text(text, style=style or ""), soft_wrap=True)


def note(text: str, style: str | None = "dim") -> None:
    """Print a remark beside the results."""
    err().print(Text(text, style=style or ""), soft_wrap=True)


def warn(text: str) -> None:
    """Print what must not be overlooked."""
    err().print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def show(table: Table) -> None:
    """Print a table of results."""
    out().print(table)


def dump(value: Any) -> None:
    """Print a result as JSON; what is not a finite number is null, for JSON has no word for it."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(lines: dict[str, str]) -> Text:
    """Return `name  value` lines with the names in one column; later lines of a value are indented under it."""
    width = max(len(name) for name in lines) + 2
    text = Text()
    for name, value in lines.items():
        first, *rest = value.split("\n")
        text.append(f"{name:<{width}}", style="bold")
        text.append(first + "\n")
        for line in rest:
            text.append(" " * width + line + "\n")
    text.rstrip()
    return text


def plain_table(*columns: str, left: int = 1) -> Table:
    """Return an empty table in the house's look: the first `left` columns are text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table


def show_error(error: DecalError) -> None:
    """Print what went wrong, what was given and how to mend it: one line each."""
    lines = [("error: ", "bold red", error.what)]
    if error.got is not None:
        lines.append(("  got: ", "bold", str(error.got)))
    lines.append(("  fix: ", "bold", error.fix))
    for name, style, text in lines:
        err().print(Text.assemble((name, style), text), soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is being waited for: a spinner on a terminal, one line elsewhere. What the library logs are notes."""
    console = err()
    with remarks():
        if console.is_terminal:
            with console.status(Text(what)):
                yield
        else:
            note(what)
            yield


@contextmanager
def remarks() -> Iterator[None]:
    """Show what the library logs in the block as notes after it, each text once however often it is said."""
    import logging

    said: dict[str, None] = {}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.setdefault(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("decal")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for text in said:
            note(f"note: {text}")


def silence() -> None:
    """Keep the libraries underneath from talking; the user's own settings of these variables win."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
