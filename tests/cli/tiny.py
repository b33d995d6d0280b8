"""Rows that a tiny model can learn, and a way to run decal within the test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from decal.cli import main


def save_rows(file: Path, count: int = 24) -> Path:
    """Write chats: a colour is asked for, its first letter is the answer."""
    colours = ("red", "green", "blue", "pink")
    lines = []
    for i in range(count):
        colour = colours[i % len(colours)]
        turns = [{"role": "user", "content": f"{colour} {i}"}, {"role": "assistant", "content": colour[0]}]
        lines.append(json.dumps({"messages": turns}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


class Decal:
    """Runs the command line in this process: `decal("train", "--model", ...)`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Said:
        self._capsys.readouterr()
        code = main.run([str(word) for word in words], debug=False)
        said = self._capsys.readouterr()
        return Said(code, said.out, said.err)

    def fine(self, *words: object) -> Said:
        """Run a command that must succeed."""
        said = self(*words)
        assert said.code == 0, said.err
        return said


def lines_of(error: str) -> Sequence[str]:
    """Return the lines of an error, which must be what, got (if anything) and fix, and no traceback."""
    found = [line for line in error.splitlines() if line.startswith(("error: ", "  got: ", "  fix: "))]
    assert "Traceback" not in error, error
    assert found, error
    assert found[0].startswith("error: "), error
    assert found[-1].startswith("  fix: "), error
    return found
