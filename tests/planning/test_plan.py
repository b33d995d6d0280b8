"""`decal plan`: what it says, what it offers, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decal import reading
from decal.planning import answer, grading, memory, shapes
from decal.planning.cards import CARDS
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from tests.cli.tiny import Decal, lines_of
from tests.planning.tiny import save_config, save_size, wanted
from tests.training.tiny_run import config, make_files


@pytest.fixture
def decal(capsys: pytest.CaptureFixture[str]) -> Decal:
    return Decal(capsys)


def test_the_command_shows_parts_fit_and_time(decal: Decal, tmp_path: Path) -> None:
    save_config(tmp_path, "llama")
    said = decal.fine("plan", tmp_path, "--gpu", "24GiB", "--card", "h100", "--seq", 128, "--rows", 1000)
    for text in ("embeddings and head", "optimizer", "activations", "host memory beside it"):
        assert text in said.out
    (head,) = [line for line in said.out.splitlines() if line.startswith("MiB")]  # a tiny model's sizes in GiB are 0.00
    assert head.split("  ")[-3:] == ["evaluation", "saving", "merging"]
    assert "training, keep all  training, checkpointing" in head
    assert "keep all: fits in 24.00 GiB" in said.out
    assert "an epoch: 250 steps in" in said.out
    assert max(len(line) for line in said.out.splitlines()) <= 100


def test_json_holds_every_phase_and_way(decal: Decal, tmp_path: Path) -> None:
    save_config(tmp_path, "llama")
    told = json.loads(decal.fine("plan", tmp_path, "--gpu", "24GiB", "--seq", 128, "--method", "qlora", "--json").out)
    assert set(told["ways"]) == set(answer.RECOMPUTE)
    for way in told["ways"].values():
        assert set(way["phases"]) == {"training", "evaluation", "saving", "merging"}
        for phase in way["phases"].values():
            assert phase["peak"] == sum(phase["parts"].values())
            assert set(phase["parts"]) == set(shapes.PARTS)


def test_the_table_needs_no_model(decal: Decal) -> None:
    out = decal.fine("plan", "--table").out
    assert "107.8" in out
    assert "6.738e9 x 16 B" in out


@pytest.mark.slow
def test_a_card_that_does_not_hold_the_weights(decal: Decal, tmp_path: Path) -> None:
    save_size(tmp_path, "8b")
    said = decal.fine("plan", tmp_path, "--gpu", "4GiB", "--seq", 512, "--micro-batch", 1)
    assert "does not fit in 4.00 GiB: it needs" in said.out
    assert "alone take" in said.err  # weights and optimizer
    assert "nothing makes it fit: take a smaller model or a larger card" in said.out
    (least,) = [line for line in said.out.splitlines() if "the least that it needs is" in line]
    told = said.out[said.out.index(least) :]
    for change in ("quantize=nf4", "train.optimizer=adamw8bit", "data.max_length=128"):
        assert change in told


def test_rows_longer_than_the_model_knows_are_cautioned(decal: Decal, tmp_path: Path) -> None:
    save_config(tmp_path, "gpt2")
    said = decal("plan", tmp_path, "--gpu", "24GiB", "--seq", 600, "--micro-batch", 1)
    assert "longer than the 512 positions" in said.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("plan",), "nothing to plan"),
        (("plan", "./nowhere"), "no such model folder"),
        (("plan", "x", "--gpu", "lots"), "--gpu is not a size of memory"),
        (("plan", "x", "--card", "h10"), "no card 'h10' is known; nearest is 'h100'"),
        (("plan", "x", "train.lrr=1"), "unknown setting 'train.lrr'"),
        (("plan", "x", "y"), "more than one model"),
    ],
)
def test_bad_input_is_told_in_plain_words(decal: Decal, words: tuple[str, ...], text: str) -> None:
    said = decal(*words)
    assert said.code == 2
    assert text in lines_of(said.err)[0]


def test_an_unknown_kind_of_model_is_named(decal: Decal, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    said = decal("plan", tmp_path, "--gpu", "8GiB")
    what, got, fix = lines_of(said.err)
    assert what.endswith("knows no model of type 'lama'; nearest is 'llama'")
    assert got == f"  got: {tmp_path / 'config.json'}"
    assert fix == "  fix: Update transformers, or check model_type in this file."


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("the model is of no known architecture", "the model is of no ..."),
        ("short", "short"),
        ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q ..."),  # without a space there is no word to end at
    ],
)
def test_a_cut_text_ends_with_a_word(text: str, cut: str) -> None:
    assert reading.one_line(text, 20) == cut


def test_a_cards_pace_is_its_rate_where_steps_are_large(tmp_path: Path) -> None:
    asked = wanted(save_size(tmp_path, "8b"), length=4096, micro_batch=2, device="cuda", numbers="bf16")
    way = answer.plan(asked, card=CARDS["h200"]).way
    assert way.pace is not None
    # 34 GFLOP a token at 4096 tokens (docs/performance.md's count of an 8B model), all of it at the card's rate
    assert way.forecast.work.flops / 8192 == pytest.approx(34e9, rel=0.05)
    assert way.pace.step > way.forecast.work.flops / 674e12


def test_a_forecast_that_fails_is_a_note_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(asked: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(memory, "forecast", broken)
    done = finetune(config(make_files(tmp_path), steps=1, check=True, eval_every=None, data={"eval_rows": 0}))
    notes = [e["text"] for e in RunDir(done.run).events() if e["kind"] == "note"]
    assert notes == ["no forecast of memory and time could be made (RuntimeError: no such operation)"]
    assert RunDir(done.run).manifest()["plan"] is None


@pytest.mark.slow
def test_a_run_that_will_hardly_fit_is_noted_with_what_would_help(tmp_path: Path) -> None:
    found = memory.forecast(wanted(save_config(tmp_path, "llama"), length=512, micro_batch=8))
    note = grading.too_large(found, found.needed - found.phase("training").peak // 3)
    assert note.startswith("this run needs about ")
    assert " MiB) with train." in note
    assert len(note) < 200
