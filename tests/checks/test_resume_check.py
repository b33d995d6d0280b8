"""`decal check --resume`: a killed run goes on with equal bits; a part that is not restored is found and named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from decal.checks import resume
from decal.errors import RunError
from decal.model.load import load_tokenizer
from decal.recipes import check as recipe
from decal.recipes.finetune import finetune
from decal.spec import RunConfig
from decal.training import state
from tests.training.tiny_run import config


@pytest.mark.slow
def test_a_killed_run_ends_in_equal_bits(folder: Path) -> None:
    found = recipe.check_resume(config(folder, early_stopping=1, log_to=[]), steps=4)
    assert found.status == "passed", found.measure
    assert found.measure.startswith("killed, resumed, compared after step 4: ")
    assert found.measure.endswith("tensors, equal bits")
    assert not (folder / "run").exists()


def forget(*_: Any) -> None:
    """Restore nothing."""


class Died(BaseException):
    """What stands for a kill where no other process is needed."""


def die(settings: RunConfig, file: Path, *, step: int) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise Died

    with pytest.raises(Died):
        finetune(settings, on_event=stop)


def test_a_run_that_broke_off_ends_in_equal_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "kill", die)
    found = recipe.check_resume(config(folder), steps=4)
    assert found.status == "passed", found.measure


@pytest.mark.parametrize(
    ("part", "measure"),
    [("_restore_generators", "weights differ, such as"), ("_load_optimizer", "weights differ, such as")],
)
def test_what_is_not_restored_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch, part: str, measure: str) -> None:
    monkeypatch.setattr(recipe, "kill", die)
    monkeypatch.setattr(state, part, forget)
    found = recipe.check_resume(config(folder), steps=4)
    assert found.status == "failed"
    assert measure in found.measure
    assert found.fix == "Do not rely on --resume for these settings, and report it: the weight is not restored."


def test_a_run_that_ends_by_itself_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "decal.recipes.killed"]
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="trace\nOSError: disk full")

    monkeypatch.setattr(subprocess, "run", ends)
    with pytest.raises(RunError, match=r"ended by itself \(exit code 1\) \(got: OSError: disk full\)"):
        recipe.kill(config(tmp_path), tmp_path / "run.yaml", step=5)


def test_the_short_form_keeps_the_shortest_rows(folder: Path, tmp_path: Path) -> None:
    settings = config(folder, data={"max_length": 512}, micro_batch=8, accumulate=4, warmup=3)
    short = resume.shortened(settings, tmp_path, steps=6, tokenizer=load_tokenizer(settings.model))
    assert short.data.max_length < 128
    assert short.data.eval_rows == 11
    assert (short.train.micro_batch, short.train.accumulate, short.train.warmup) == (2, 2, 1)
    assert (short.train.steps, short.train.save_every, short.train.eval_every) == (6, 3, 3)
    assert short.lora == settings.lora


def test_differences_are_shares_of_the_largest_value() -> None:
    values = torch.tensor([1.0, -4.0])
    assert resume.difference(values, values) == 0.0
    assert resume.difference(values + torch.tensor([0.0, 0.04]), values) == pytest.approx(0.01)
    assert resume.difference(values, values.double()) == float("inf")
