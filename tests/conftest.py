"""What every test needs."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as triton is first imported, by whichever test that is


@pytest.fixture(autouse=True)
def _same_seed_in_every_test() -> None:
    """Each test starts from one seed, whatever ran before it."""
    torch.manual_seed(0)
