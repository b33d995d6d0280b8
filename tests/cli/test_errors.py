"""What people get wrong: a few lines that say what, what was given and how to mend it; exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.tiny import Decal, lines_of


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--model", "m", "--data", "d", "trian.lr=1"], "'train.lr'"),
        (["train", "--model", "m", "--data", "d", "lr=1"], "'train.lr'"),
        (["train", "--model", "m", "--data", "d", "lora.rank=8"], "'lora.r'"),
        (["train", "--model", "m", "--data", "d", "learning_rate=1"], "'train.lr'"),
        (["train", "--model", "m", "--data", "d", "train.lr=fast"], "'train.lr' must be a number"),
        (["train", "--model", "m", "--data", "d", "train=5"], "'train' is a section of settings"),
        (["train", "--model", "m", "--data", "d", "lora.target_modules=[q_proj"], "is not a regular expression"),
        (["train", "--model", "m", "--data", "d", "quantize.blok=64"], "'quantize.block'"),
        (["train", "--model", "m", "--data", "d", "--rnak", "8"], "'--rank'"),
        (["train", "--model", "m", "--data", "d", "--method", "qlora"], "lora"),
        (["train", "nowhere.yaml"], "no such settings file"),
        (["train"], "nothing to train"),
        (["train", "a.yaml", "b.yaml"], "more than one settings file"),
        (["quickstart", "train.lrr=1"], "'train.lr'"),
        (["generate", "--prompt", "hello"], "neither a model nor an adapter"),
        (["generate", "-a", "/nowhere/adapter", "--prompt", "hello"], "no such adapter folder"),
        (["generate", "-a", "x", "--file", "nowhere.txt"], "no such prompt file"),
        (["inspect", "/nowhere/adapter"], "no such adapter folder"),
        (["targets", "/nowhere/model"], "no such model folder"),
        (["params", "/nowhere/model", "--rank", "many"], "--rank"),
        (["merge", "x"], "--out"),
        (["chatt"], "chat"),
    ],
)
def test_a_wrong_word_is_answered_in_lines_that_help(decal: Decal, words: list[str], expected: str) -> None:
    said = decal(*words)
    assert said.code == 2
    assert said.out == ""
    assert expected in "\n".join(lines_of(said.err))


def test_a_broken_line_of_data_is_named_by_its_number(decal: Decal, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"mess\n')
    said = decal("train", "--model", model, "--data", file, "--output", tmp_path / "run")
    assert said.code == 2
    assert "line 2" in lines_of(said.err)[0]
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused_with_both_ways_out(decal: Decal, model: Path, rows: Path, run: Path) -> None:
    said = decal("train", "--model", model, "--data", rows, "--output", run)
    assert said.code == 2
    fix = lines_of(said.err)[-1]
    assert "--output" in fix
    assert f"decal train {run / 'run.yaml'} --resume" in fix


def test_an_adapter_given_as_a_model_is_told_apart(decal: Decal, run: Path, rows: Path, tmp_path: Path) -> None:
    said = decal("train", "--model", run / "adapter", "--data", rows, "--output", tmp_path / "run")
    assert said.code == 2
    assert "--adapter" in lines_of(said.err)[-1]


def test_a_model_given_as_an_adapter_is_told_apart(decal: Decal, model: Path) -> None:
    for words in (["generate", "--prompt", "x", "-a", model], ["inspect", model]):
        said = decal(*words)
        assert said.code == 2
        assert "whole model" in "\n".join(lines_of(said.err))


def test_an_adapter_whose_base_is_gone_asks_for_the_base(decal: Decal, run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": "/gone/model"}))
    said = decal("generate", "-a", adapter, "--prompt", "x")
    assert said.code == 2
    assert "--model" in lines_of(said.err)[-1]


def test_an_unknown_target_names_the_nearest(decal: Decal, model: Path) -> None:
    said = decal("targets", model, "--targets", "q_prj")
    assert said.code == 2
    assert "'q_proj'" in lines_of(said.err)[0]


def test_debug_shows_where_it_happened(capsys: pytest.CaptureFixture[str]) -> None:
    from decal.cli import main

    assert main.run(["train", "nowhere.yaml"], debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_our_own_is_short_too(decal: Decal, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    from decal.model import load

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("cannot\nat all")

    monkeypatch.setattr(load, "meta_model", broken)
    said = decal("params", model)
    assert said.code == 1
    assert "RuntimeError: cannot" in lines_of(said.err)[0]
    assert "--debug" in lines_of(said.err)[-1]
