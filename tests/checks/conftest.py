"""A tiny job, ready to train, that the tests of the checks share: checks leave it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from decal.training.job import Job, prepare
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="session")
def job(folder: Path) -> Job:
    return prepare(config(folder, lr=2e-3))
