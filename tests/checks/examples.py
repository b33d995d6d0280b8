"""docs/checks.md as the tests read it: of each check one failure as it is printed, from a fault that a test plants."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from decal.checks.result import Check
from decal.cli import check as command

TESTS = Path(__file__).parent
PAGE = TESTS.parents[1] / "docs" / "checks.md"
EXAMPLE = re.compile(r"^FAILED  (.{14})\S.*\n {8}fix: .*$", re.MULTILINE)
NUMBER = re.compile(r"(\d+(?:[.,]\d+)*(?:e[+-]?\d+)?)")
HELD = re.compile(r'\bshown\("([a-z ]+)"')


def examples() -> dict[str, str]:
    """Return {check: its example on the page, two lines}."""
    return {found[1].strip(): found[0] for found in EXAMPLE.finditer(PAGE.read_text(encoding="utf-8"))}


def printed(check: Check) -> str:
    """Return the lines that `decal check` prints of an answer."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command.answer(check)
    return out.getvalue().rstrip("\n")


def shown(name: str, check: Check) -> None:
    """Assert that the page shows this failure as it is printed.

    Words are equal. Numbers are so within a twentieth: they have two or three digits, of which sums in another order,
    on another processor, may move the last.
    """
    page, now = NUMBER.split(examples().get(name, "")), NUMBER.split(printed(check))
    stale = f"the example of {name!r} in docs/checks.md has gone stale; now it is\n{printed(check)}"
    assert page[::2] == now[::2], stale
    numbers = [[float(number.replace(",", "")) for number in side[1::2]] for side in (page, now)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05), stale


def held() -> set[str]:
    """Return the checks whose example a test holds."""
    return {name for file in TESTS.glob("test_*.py") for name in HELD.findall(file.read_text(encoding="utf-8"))}
