"""Damaged files of every kind: an error in plain words, or correct work; the defects are listed if there are any."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.fuzz import DEFECT, EQUAL, OTHER, REFUSED, fuzz, table


@pytest.mark.filterwarnings("ignore")  # the libraries' about what they read; the user's are silenced, too
@pytest.mark.parametrize(
    ("cases", "seed"), [(200, 0), pytest.param(2500, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_no_damage_is_taken_silently_or_ends_in_another_exception(tmp_path: Path, cases: int, seed: int) -> None:
    done = fuzz(tmp_path, cases, seed)
    print(table(done))
    assert [case for case in done if case.outcome == DEFECT] == [], table(done)
    counts = Counter(case.outcome for case in done)
    assert len(done) == cases
    assert counts[REFUSED] > 0.6 * cases  # most of it is damage, not another file that is valid
    assert counts[EQUAL] + counts[OTHER] > 0.05 * cases
