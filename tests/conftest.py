"""What every test needs."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed_in_every_test() -> None:
    """Each test starts from one seed, whatever ran before it."""
    torch.manual_seed(0)
