"""docs/failures.md as the tests read it: one row a silent failure, with the words that decal says about it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "failures.md"
ROW = re.compile(r"^\| (\d+) \|(.*)\|$")


def rows() -> dict[int, str]:
    """Return {number: the row's cells as text}."""
    found = (ROW.match(line) for line in PAGE.read_text(encoding="utf-8").splitlines())
    return {int(match[1]): match[2] for match in found if match}


def told(row: int, said: object) -> None:
    """Assert that the page's row quotes `said` word for word; `...` there stands for what another run may say."""
    quoted = re.findall(r"`([^`]+)`", rows()[row].replace("\\|", "|"))
    patterns = [".*".join(re.escape(part) for part in quote.split("...")) for quote in quoted]
    assert any(re.fullmatch(pattern, str(said)) for pattern in patterns), f"row {row} does not quote: {said}"
