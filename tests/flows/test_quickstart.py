"""The quickstart: a small one through all its stages, and (slow) the real one with its promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decal.recipes import quickstart


def test_a_small_quickstart_goes_through_all_stages(tmp_path: Path) -> None:
    stages: list[str] = []
    overrides = ["train.steps=2", "data.max_length=128"]

    def hear(event: dict[str, object]) -> None:
        if event["kind"] == "stage":
            stages.append(str(event["text"]))

    done = quickstart.quickstart(tmp_path / "q", training=192, held_out=4, overrides=overrides, on_event=hear)
    assert len(stages) >= 4
    assert len(done.before.answers) == len(done.after.answers) == 4
    assert (tmp_path / "q" / "tickets" / "heldout.jsonl").is_file()
    assert (done.finetuned.result / "adapter_model.safetensors").is_file()
    assert done.baseline is None or 0 <= done.baseline <= 1
    assert 0 < done.finetuned.trainable < done.total


def test_the_command_prints_what_was_measured(tmp_path: Path) -> None:
    words = ["quickstart", "--output", str(tmp_path / "q"), "--tickets", "192", "--held-out", "4"]
    command = [sys.executable, "-m", "decal.cli.main", *words, "train.steps=2", "data.max_length=128"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    for part in ("right before", "right after", "parameters", "adapter", "next"):
        assert part in done.stdout
    assert "did not" in done.stderr  # two steps teach nothing, and that is said
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_quickstart_keeps_its_promise(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "decal.cli.main", "quickstart", "--output", str(tmp_path / "q"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    facts = json.loads(done.stdout)
    assert facts["accuracy_before"] <= quickstart.EXPECTED_BEFORE
    assert facts["accuracy_after"] >= quickstart.WANTED_AFTER
