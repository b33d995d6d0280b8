"""A way to run decal within the test."""

from __future__ import annotations

import pytest

from tests.cli.tiny import Decal


@pytest.fixture
def decal(capsys: pytest.CaptureFixture[str]) -> Decal:
    return Decal(capsys)
