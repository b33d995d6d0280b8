"""docs/failures.md as the tests read it: one row a silent failure, with the words that decal says about it.

Each quote has a key, its row and its place there: "8b" is the second of row 8. A test that plants a fault says by its
key which quote it holds to (`told("8b", error)`), so that test_page.py sees, without running anything, that every quote
is held by a test: one whose words have gone stale fails its test, and one that no test asks about fails there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "failures.md"
ROW = re.compile(r"^\| (\d+) \|(.*)\|$")
KEY = re.compile(r"\d{1,2}[a-z]")
PIPE = "\0"  # stands for a bar within a cell


def rows() -> dict[int, list[str]]:
    """Return {number: the row's cells after it}."""
    found = (ROW.match(line) for line in PAGE.read_text(encoding="utf-8").splitlines())
    cells = {int(match[1]): match[2].replace("\\|", PIPE).split("|") for match in found if match}
    return {number: [cell.strip().replace(PIPE, "|") for cell in row] for number, row in cells.items()}


def quotes() -> dict[str, str]:
    """Return {key: what decal says}, from the last cell of each row."""
    return {
        f"{number}{chr(ord('a') + place)}": quote
        for number, cells in rows().items()
        for place, quote in enumerate(re.findall(r"`([^`]+)`", cells[-1]))
    }


def told(key: str, said: object) -> None:
    """Assert that the page's quote is `said` word for word; `...` there stands for what another run may say."""
    quote = quotes()[key]
    pattern = ".*".join(re.escape(part) for part in quote.split("..."))
    assert re.fullmatch(pattern, str(said)), f"quote {key} has gone stale:\n  page: {quote}\n  said: {said}"


def held() -> set[str]:
    """Return the keys that stand in tests which call `told`, parameters of the test included."""
    return {key for file in TESTS.rglob("test_*.py") for key in held_in(ast.parse(file.read_text(encoding="utf-8")))}


def held_in(module: ast.Module) -> Iterator[str]:
    """Yield the keys of one file's tests."""
    for function in (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)):
        nodes = list(ast.walk(function))
        if any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "told" for n in nodes):
            words = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            yield from (word for word in words if KEY.fullmatch(word))
