"""The tiny model, rows and one finished run that the command-line tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from decal.recipes.finetune import finetune
from decal.spec import read_run_config
from tests.cli.tiny import Decal, save_rows
from tests.integration.tiny import save_model


@pytest.fixture
def decal(capsys: pytest.CaptureFixture[str]) -> Decal:
    return Decal(capsys)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows") / "chats.jsonl")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path) -> Path:
    """A finished run of two steps; its adapter lies in run/adapter."""
    output = tmp_path_factory.mktemp("runs") / "first"
    values = {"model": str(model), "data.path": str(rows), "output": str(output), "data.max_length": 64}
    finetune(read_run_config(values={**values, "train.steps": 2, "train.lr": 1e-2, "train.device": "cpu"}))
    return output
