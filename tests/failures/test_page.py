"""The page of silent failures is whole, and no quote on it can go stale."""

from __future__ import annotations

import ast

import pytest

from tests.failures import page
from tests.failures.page import held, held_in, quotes, rows, told

NOTHING_TO_SAY = {15, 16, 34}  # what goes wrong elsewhere cannot be asked for; the page says why


def test_each_of_the_34_says_what_decal_does_and_in_what_words() -> None:
    assert list(rows()) == list(range(1, 35))
    assert {number for number, cells in rows().items() if not cells[-1]} == NOTHING_TO_SAY


def test_every_quote_is_held_by_a_test_and_every_test_holds_one() -> None:
    assert held() == set(quotes())


def test_a_quote_that_is_not_what_is_said_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "quotes", lambda: {"1a": "no ... here (got: 3)"})
    told("1a", "no room here (got: 3)")
    for stale in ("no room here (got: 4)", "no room here", "so no room here (got: 3)"):
        with pytest.raises(AssertionError, match="quote 1a has gone stale"):
            told("1a", stale)


def test_a_key_counts_only_where_it_is_asked_about() -> None:
    asks = "@mark('x', '8b')\ndef test_a(key):\n    told(key, say())\n"
    names = "def test_b():\n    assert '8c'\n"
    assert list(held_in(ast.parse(asks + names))) == ["8b"]
