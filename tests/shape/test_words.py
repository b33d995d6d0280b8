"""How counts are written: one of a thing is no plural."""

from __future__ import annotations

import pytest

from decal.words import counted


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (1, "row", "1 row"),
        (0, "row", "0 rows"),
        (2048, "learnt token", "2,048 learnt tokens"),
        (1, "matrix", "1 matrix"),
        (28, "matrix", "28 matrices"),
        (2, "entry", "2 entries"),
    ],
)
def test_one_is_no_plural(number: int, thing: str, said: str) -> None:
    assert counted(number, thing) == said
