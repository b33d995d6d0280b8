"""`decal check` and `decal doctor` as a person or a script meets them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from decal.checks import kernels, resume
from decal.checks.kernels import Codec
from decal.checks.result import Check, failed, passed
from decal.cli import check as command
from decal.recipes import check as recipe
from tests.cli.tiny import Decal, lines_of


def words(model: Path, rows: Path) -> Sequence[object]:
    return ("check", "-m", model, "-d", rows, "data.max_length=64", "train.lr=2e-3", "train.device=cpu")


def test_rows_and_checks_in_plain_text(decal: Decal, model: Path, rows: Path) -> None:
    said = decal.fine(*words(model, rows), "--rows", 1)
    lines = said.out.splitlines()
    assert lines[0] == "read, not learnt  [[learnt]]  {{learnt stop token}}  special token  "
    assert lines[2].startswith("row 1: ")
    assert "| <|im_start|>user\u21b5" in lines
    assert any(line.strip().startswith("[[") and "]]{{<|im_end|>}}" in line for line in lines)
    assert not any(line.startswith("row 2") for line in lines)
    assert any(line.startswith("passed  tokenizer     loss ") for line in lines)
    assert any(line.startswith("passed  overfit       8 rows, ") for line in lines)
    assert lines[-1].startswith("8 passed in ")


def test_in_colour_only_what_is_learnt_is_green(
    decal: Decal, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = decal.fine(*words(model, rows), "--rows", 1).out
    assert re.search("\x1b\\[1;32m(r|g|b|p)\x1b\\[0m\x1b\\[1;30;42m<\\|im_end\\|>\x1b\\[0m", out)
    assert "\x1b[36m<|im_start|>\x1b[0m\x1b[2muser\u21b5" in out
    assert "[[" not in out.replace("\x1b[", "")


def test_json_holds_rows_and_checks(decal: Decal, model: Path, rows: Path) -> None:
    told = json.loads(decal.fine(*words(model, rows), "--rows", 2, "--json").out)
    assert told["checks"][0]["name"] == "loss"
    assert {check["status"] for check in told["checks"]} == {"passed"}
    assert len(told["rows"]) == 2
    kinds = {piece["kind"] for row in told["rows"] for sample in row["shown"] for piece in sample}
    assert kinds == {"read", "special", "learnt", "stop"}


def test_a_failed_check_is_exit_code_3_with_the_fix_under_it(decal: Decal, model: Path, rows: Path) -> None:
    said = decal(*words(model, rows), "--rows", 0, "train.lr=1e-12")
    assert said.code == command.FAILED == 3
    lines = said.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED  reach         "))
    assert "stand still at train.lr=1e-12" in lines[at]
    assert lines[at + 1].startswith("        fix: Raise train.lr")
    assert " failed in " in lines[-1]


def test_what_cannot_be_checked_at_all_is_exit_code_2(decal: Decal, model: Path) -> None:
    said = decal("check", "-m", model, "-d", "nowhere.jsonl")
    assert said.code == 2
    assert lines_of(said.err)


def test_the_proof_of_resume_says_what_it_changed(
    decal: Decal, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "finetune", lambda *_, **__: None)  # trained for real in tests/checks
    monkeypatch.setattr(recipe, "kill", lambda *_, **__: None)
    monkeypatch.setattr(resume, "compare", lambda *_, **__: passed(resume.NAME, "equal bits"))
    said = decal.fine(*words(model, rows), "--resume")
    (told,) = [line for line in said.err.splitlines() if line.startswith("short form of the run, ")]
    assert "train.steps=6, train.save_every=3 (few steps, a checkpoint in the middle)" in told
    assert said.out.splitlines()[0] == "passed  resume        equal bits"
    held = json.loads(decal.fine(*words(model, rows), "--resume", "--json").out)
    assert held["changed"][0]["settings"] == "train.steps=6, train.save_every=3"


def test_train_says_in_one_line_that_the_checks_passed(decal: Decal, model: Path, rows: Path, tmp_path: Path) -> None:
    run = (
        "train",
        "-m",
        model,
        "-d",
        rows,
        "-o",
        tmp_path / "run",
        "--steps",
        1,
        "data.max_length=64",
        "--device",
        "cpu",
    )
    said = decal.fine(*run)
    assert sum(line.startswith("checks: 6 passed in ") for line in said.err.splitlines()) == 1


def test_train_refuses_what_a_check_finds_and_writes_nothing(
    decal: Decal, model: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = ("train", "-m", model, "-d", rows, "-o", output, "--steps", 1, "data.max_length=64", "--device", "cpu")
    said = decal(*run, "--lr", "1e-12")
    assert said.code == 2
    assert "error: the check 'reach' failed: " in said.err
    assert "  fix: Raise train.lr" in said.err
    assert not output.exists()
    assert decal(*run, "--lr", "1e-12", "train.check=false").code == 0


def test_doctor(decal: Decal) -> None:
    said = decal.fine("doctor")
    assert "versions   python 3." in said.out
    assert any(line.startswith("passed  4-bit decode  ") for line in said.out.splitlines())
    told = json.loads(decal.fine("doctor", "--json").out)
    assert set(told) == {"machine", "versions", "room", "environment", "missing", "notes", "kernels"}


def test_a_wrong_kernel_is_exit_code_3(decal: Decal, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: object, codec: Codec | None) -> list[Check]:
        return [failed("4-bit decode", "numba on cpu: largest difference 1.0e+00", fix="Reinstall numba.")]

    monkeypatch.setattr(kernels, "check", wrong)
    said = decal("doctor")
    assert said.code == 3
    assert "FAILED  4-bit decode" in said.out
    assert "        fix: Reinstall numba." in said.out
