"""Ctrl-C in the middle of a run: the command that is printed brings the run to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.tiny import save_rows
from tests.integration.tiny import save_model

DECAL = [sys.executable, "-m", "decal.cli.main"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    model, rows = save_model(tmp_path / "model"), save_rows(tmp_path / "chats.jsonl")
    words = ["train", "-m", str(model), "-d", str(rows), "--steps", "40", "--max-length", "64", "train.save_every=1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    process = subprocess.Popen([*DECAL, *words, "-o", str(run)], stderr=subprocess.PIPE, text=True, env=environment)
    events = run / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and '"step": 2,' in events.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped: " in said
    resume = said.rpartition("decal ")[2].split()
    assert resume == ["train", str(run / "run.yaml"), "--resume"]
    assert not (run / "adapter").exists()
    subprocess.run([*DECAL, *resume], capture_output=True, check=True, env=environment)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
