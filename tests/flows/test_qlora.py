"""A 4-bit run from settings to merged model: it learns, resumes, and is merged as measures best, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decal.errors import ConfigError, RunError
from decal.layers.nf4_linear import NF4Linear
from decal.model.load import load_model
from decal.recipes import compare
from decal.recipes.finetune import Finetuned, finetune
from decal.recipes.merge import Merged, merge
from decal.rundir import RunDir
from decal.spec import RunConfig
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def coded(folder: Path, output: str, **train: Any) -> RunConfig:
    """Return the settings of a tiny run on an NF4 base."""
    settings = config(folder, output=output, **train).model_dump(mode="json")
    return RunConfig(**{**settings, "quantize": "nf4"})


@pytest.fixture(scope="module")
def trained(folder: Path) -> Finetuned:
    return finetune(coded(folder, "trained"))


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in RunDir(run).events() if event["kind"] == "step"]


def test_it_learns_and_remembers_what_it_stood_on(trained: Finetuned) -> None:
    assert trained.eval_loss is not None
    assert trained.eval_before is not None
    assert trained.eval_loss < 0.8 * trained.eval_before
    (note,) = [e["text"] for e in RunDir(trained.run).events() if e["kind"] == "note" and "stored in nf4" in e["text"]]
    assert note.startswith("14 layers")
    assert "lm_head" in note
    variants = compare.load(None, [str(trained.run)], device="cpu")
    assert any(isinstance(m, NF4Linear) for m in variants.model.modules())


def test_resumed_equals_uninterrupted(folder: Path, trained: Finetuned) -> None:
    finetune(coded(folder, "cut", steps=10))
    checkpoints = RunDir(folder / "cut").path / "checkpoints"
    (checkpoints / "step-10").rename(folder / "gone")
    again = finetune(coded(folder, "cut", steps=10), resume=True)
    assert losses(again.run)[-1] == losses(trained.run)[-1]


def test_the_merge_takes_the_weights_that_it_was_trained_on(folder: Path, trained: Finetuned, tmp_path: Path) -> None:
    merged = merge(str(trained.run), tmp_path / "merged", dtype="fp32", data=str(folder / "data.jsonl"))
    by_way = {candidate.into: candidate for candidate in merged.candidates}
    assert by_way.keys() == {"16bit", "dequantized", "nf4"}
    assert merged.into == "dequantized"
    assert by_way["dequantized"].kl < 1e-6  # the same fp32 weights, summed in another order
    assert by_way["16bit"].kl > 100 * by_way["dequantized"].kl
    assert by_way["nf4"].rounding.survived < by_way["dequantized"].rounding.survived
    assert merged.agreement.kl < 1e-6
    assert not any(isinstance(m, NF4Linear) for m in load_model(tmp_path / "merged", device="cpu").modules())


def test_merged_into_nf4_is_written_in_the_common_layout(trained: Finetuned, tmp_path: Path) -> None:
    merged: Merged = merge(str(trained.run), tmp_path / "nf4", into="nf4", force=True)
    again = load_model(tmp_path / "nf4", device="cpu")
    assert any(isinstance(m, NF4Linear) for m in again.modules())
    assert merged.agreement.kl == pytest.approx(merged.candidates[0].kl, rel=1e-3)  # written is what was measured


def test_a_merge_that_erases_the_update_is_refused(folder: Path, tmp_path: Path) -> None:
    timid = finetune(coded(folder, "timid", lr=2e-5))
    with pytest.raises(RunError, match="nearer to the untouched base"):
        merge(str(timid.run), tmp_path / "erased", into="nf4")
    assert not (tmp_path / "erased").exists()
    assert merge(str(timid.run), tmp_path / "forced", into="nf4", force=True).candidates[0].lost


def test_what_cannot_be_asked_for(folder: Path, tmp_path: Path) -> None:
    plain = finetune(config(folder, output="plain", steps=2))
    with pytest.raises(ConfigError, match="cannot be merged into 'nf4'"):
        merge(str(plain.run), tmp_path / "out", into="nf4")
    with pytest.raises(ConfigError, match="full fine-tuning"):
        coded(folder, "full", method="full")
    with pytest.raises(ConfigError, match="format"):
        RunConfig(**{**config(folder).model_dump(mode="json"), "quantize": "nf5"})
    assert torch.get_default_dtype() == torch.float32
