"""The command line answers before torch could even be imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decal.cli import main
from tests.cli.tiny import Decal

NAMES = [command.__name__.rpartition(".")[2] for command in main.COMMANDS]


def test_help_and_wrong_settings_never_import_torch() -> None:
    code = (
        "import sys\n"
        "from decal.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['train', '-m', 'm', '-d', 'd', 'trian.lr=1']):\n"
        "    main.run(words, debug=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("words", "limit"), [(["--help"], 0.5), (["train", "-m", "m", "-d", "d", "trian.lr=1"], 1.0)])
def test_the_first_answer_costs_little_processor_time(words: list[str], limit: float) -> None:
    best = 10.0
    for _ in range(12):  # on a busy processor the same work counts for more
        if best < limit:
            break
        began = os.times()
        subprocess.run([sys.executable, "-m", "decal.cli.main", *words], capture_output=True, check=False)
        ended = os.times()
        best = min(best, ended.children_user - began.children_user + ended.children_system - began.children_system)
    assert best < limit


def test_every_command_has_help_with_an_example(decal: Decal) -> None:
    for name in NAMES:
        assert f"decal {name}" in decal.fine(name, "--help").out.replace("Usage: decal", "")


def test_no_command_at_all_shows_the_help(decal: Decal) -> None:
    said = decal.fine()
    assert "quickstart" in said.out
    assert said.err == ""


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m decal.cli.main --help | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_plain_text_where_there_is_no_terminal() -> None:
    began = time.monotonic()
    words = [sys.executable, "-m", "decal.cli.main", "train", "nowhere.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert time.monotonic() - began < 30
