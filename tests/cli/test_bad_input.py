"""Each command with what it cannot use: a missing file, a folder for a file, a wrong type, an empty or unreadable one.

Always exit code 2, nothing on stdout, and lines that say what, got and fix; a traceback with --debug alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from decal.cli import main
from tests.cli.tiny import Decal, lines_of

LONG = "a" * 5000
TRAIN = ["train", "-m", "MODEL", "-d", "rows.jsonl"]
ASK = ["generate", "-p", "x", "-m", "MODEL"]
BAD: list[tuple[list[str], str]] = [
    (["train", "nowhere.yaml"], "no such settings file"),
    (["train", "folder"], "no such settings file"),
    (["train", "empty.txt"], "must hold settings as `key: value`"),
    (["train", "latin.txt"], "is not YAML"),
    (["train", "twice.yaml"], "'train' stands twice"),
    (["train", LONG], "File name too long"),
    (["train", "a\0b.yaml"], "no such settings file"),
    (["train", "-m", "nowhere/at/all", "-d", "rows.jsonl"], "no such model folder"),
    (["train", "-m", "empty.txt", "-d", "rows.jsonl"], "the model must be a folder"),
    (["train", "-m", "folder", "-d", "rows.jsonl"], "no tokenizer could be loaded"),
    (["train", "-m", LONG, "-d", "rows.jsonl"], "File name too long"),
    (["train", "-m", "MODEL", "-d", "./nowhere.jsonl"], "no such data file or folder"),
    (["train", "-m", "MODEL", "-d", "folder"], "the folder holds no data files"),
    (["train", "-m", "MODEL", "-d", "empty.jsonl"], "the data file is empty"),
    (["train", "-m", "MODEL", "-d", "latin.txt"], "unknown kind of data file"),
    (["train", "-m", "MODEL", "-d", "latin.jsonl"], "not UTF-8"),
    (["train", "-m", "MODEL", "-d", "numbers.jsonl"], "must hold one JSON object"),
    ([*TRAIN, "-o", "empty.txt"], "a file lies where the output folder should be"),
    ([*TRAIN, "-o", "folder"], "the output folder is not empty"),
    ([*TRAIN, "-o", "a\0b"], "the output folder cannot be made or written to"),
    ([*TRAIN, "-o", "a" * 300], "File name too long"),
    ([*TRAIN, "-o", "new", "--resume"], "there is no run to resume here"),
    ([*TRAIN, "--device", "tpu"], "no such device"),
    ([*TRAIN, "--rank", "0"], "'lora.r' must be"),
    ([*TRAIN, "train.steps=many"], "'train.steps' must be a whole number"),
    (["generate", "--file", "nowhere.txt", "-m", "MODEL"], "no such prompt file"),
    (["generate", "--file", "folder", "-m", "MODEL"], "no such prompt file"),
    (["generate", "--file", "latin.txt", "-m", "MODEL"], "the prompt file cannot be read"),
    (["generate", "--file", "empty.txt", "-m", "MODEL"], "no prompt is given"),
    (["generate", "--file", "numbers.jsonl", "-a", "folder"], "no adapter_config.json"),
    ([*ASK, "--device", "tpu"], "no such device"),
    ([*ASK, "--max-new-tokens", "0"], "--max-new-tokens"),
    ([*ASK, "--temperature", "-1"], "--temperature"),
    ([*ASK, "--seed", "9" * 30], "--seed"),
    ([*ASK, "-a", "MODEL"], "adapter"),
    (["chat", "-m", "empty.txt"], "the model must be a folder"),
    (["chat", "-a", "folder"], "no adapter_config.json"),
    (["inspect", "empty.txt"], "the adapter must be a folder"),
    (["inspect", "folder"], "no adapter_config.json"),
    (["inspect", "a/" * 3000], "File name too long"),
    (["targets", "folder"], "holds no model"),
    (["targets", "MODEL", "--targets", "["], "is not a regular expression"),
    (["params", "MODEL", "--rank", "-1"], "rank"),
    (["params", "empty.txt"], "the model must be a folder"),
    (["merge", "folder", "--out", "new"], "no adapter_config.json"),
    (["merge", "MODEL", "--out", "folder"], "the output folder is not empty"),
    (["merge", "MODEL", "--out", "a" * 300], "File name too long"),
    (["quantize", "folder", "new"], "holds no model"),
    (["quantize", "MODEL", "empty.txt"], "the output folder is not empty"),
    (["quantize", "MODEL", "a" * 300], "File name too long"),
    (["quantize", "MODEL", "--block", "7"], "block"),
    (["quickstart", "-o", "empty.txt"], "the output folder is not empty"),
    (["quickstart", "--speed", "9"], "no such option: --speed"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path) -> Path:
    """Return the current folder, with the files that the table names."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.md").write_text("nothing of use")
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "numbers.jsonl").write_text("1\n2\n")
    (tmp_path / "twice.yaml").write_text("model: m\ntrain: {lr: 1}\ndata: {path: d}\ntrain: {lr: 2}\n")
    (tmp_path / "rows.jsonl").write_bytes(rows.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_what_a_command_cannot_use_is_said_in_lines(
    decal: Decal, model: Path, place: Path, words: list[str], expected: str
) -> None:
    before = sorted(path.name for path in place.iterdir())
    said = decal(*(model if word == "MODEL" else word for word in words))
    assert said.code == 2, said.err
    assert said.out == ""
    what, *_, fix = lines_of(said.err)
    assert expected in what
    assert fix.removeprefix("  fix: ")
    for line in lines_of(said.err):
        assert len(line.replace(str(model), "").replace(str(place), "").replace(LONG, "")) <= 320, line
    assert sorted(path.name for path in place.iterdir()) == before  # nothing was begun


@pytest.mark.parametrize(("debug", "shown"), [(True, True), (False, False)])
def test_a_traceback_is_shown_on_demand_only(
    capsys: pytest.CaptureFixture[str], place: Path, debug: bool, shown: bool
) -> None:
    assert main.run(["train", LONG], debug=debug) == 2  # an error of the system's
    assert main.run(["train", "nowhere.yaml"], debug=debug) == 2  # one of ours
    assert capsys.readouterr().err.count("Traceback") == 2 * shown


def test_a_file_that_may_not_be_read(decal: Decal, model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's; to root, who may run the tests, no file is closed, so the refusal is made here."""

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    said = decal("generate", "--file", "latin.txt", "-m", model)
    assert said.code == 2
    assert "Permission denied" in lines_of(said.err)[0]


def test_results_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "decal.cli.main", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert "No space left on device" in lines_of(done.stderr)[0]
    assert len(done.stderr.splitlines()) == 2  # and Python adds nothing as it ends
