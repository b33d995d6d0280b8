"""`decal plan run.yaml`: the epoch and the largest batch come from the data, and the evaluation from the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.planning import epoch
from decal.training import job
from tests.cli.tiny import Decal
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("planned"))


@pytest.fixture
def decal(capsys: pytest.CaptureFixture[str]) -> Decal:
    return Decal(capsys)


def settings(files: Path, folder: Path, **data: Any) -> Path:
    """Write a settings file beside nothing else."""
    told = config(files, data={"eval_rows": 0, **data}, eval_every=None, gradient_checkpointing=False)
    file = folder / "run.yaml"
    file.write_text(json.dumps(told.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")  # JSON is YAML
    return file


def test_an_epoch_is_what_training_would_read(files: Path) -> None:
    asked = config(files)
    found = epoch.read(asked)
    assert isinstance(found, epoch.Read)
    batches = job.prepare(asked).batches
    steps = list(batches.epoch())
    counted = found.epoch()
    assert counted.steps == len(steps)
    assert counted.tokens == sum(batch.tokens for step in steps for batch in step)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"path": "owner/rows"}, "there is no owner/rows here"),
        ({"eval_path": "nowhere.jsonl", "eval_rows": 0}, "there is no nowhere.jsonl here"),
        ({"streaming": True}, "the data are a stream"),
        ({"eval_rows": 1000}, "training would refuse the data, for eval_rows leaves no row to train on"),
    ],
)
def test_why_there_is_no_epoch_is_told_in_a_line(files: Path, data: dict[str, Any], why: str) -> None:
    assert epoch.read(config(files, data=data)) == why


def test_large_data_and_a_model_without_a_tokenizer_are_not_read(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = config(files).model_copy(update={"model": str(tmp_path)})
    assert epoch.read(far) == "the model's tokenizer is not here"
    monkeypatch.setattr(epoch, "CHEAP", 1 << 10)
    assert str(epoch.read(config(files))).startswith("the data are larger than ")


def test_the_command_takes_the_epoch_from_the_data(decal: Decal, files: Path, tmp_path: Path) -> None:
    said = decal.fine("plan", settings(files, tmp_path), "--card", "h100", "--json")
    told = json.loads(said.out)
    found = epoch.read(config(files, data={"eval_rows": 0}))
    assert isinstance(found, epoch.Read)
    largest = found.batches.largest()
    assert largest is not None
    assert (told["micro_batch"], told["length"]) == tuple(largest.input_ids.shape)
    way, counted = told["ways"][told["chosen"]], found.epoch()
    assert way["steps_per_epoch"] == counted.steps
    per_token = way["seconds_per_step"] / (2 * largest.tokens)  # 2 micro-batches to a step
    assert way["seconds_per_epoch"] == pytest.approx(per_token * counted.tokens)


@pytest.mark.parametrize("rows", [0, 4])
def test_an_evaluation_is_planned_where_the_settings_ask_for_one(
    decal: Decal, files: Path, tmp_path: Path, rows: int
) -> None:
    said = decal.fine("plan", settings(files, tmp_path, eval_rows=rows), "--card", "h100")
    (head,) = [line for line in said.out.splitlines() if line.startswith("MiB")]
    assert ("evaluation" in head) == bool(rows)
    assert "an epoch: " in said.out


def test_a_plan_without_an_epoch_says_why(decal: Decal, files: Path, tmp_path: Path) -> None:
    file = settings(files, tmp_path, path="owner/rows")
    said = decal.fine("plan", file, "--card", "h100")
    assert "an epoch: not known (there is no owner/rows here); give --rows or --tokens" in said.out
