"""Runs with an output head in codes: they learn, say what the codes change, are planned, checked and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal.errors import ConfigError, Unsupported
from decal.evaluate import coded_head
from decal.evaluate.closeness import mean_kl
from decal.layers.coded import CodedBase, CodedLinear
from decal.model.load import load_model
from decal.ops import slabs
from decal.recipes import check, compare
from decal.recipes.finetune import Finetuned, finetune
from decal.recipes.merge import merge
from decal.report import run as page
from decal.rundir import RunDir
from decal.spec import QuantConfig, RunConfig
from tests.integration import tiny
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_files(tmp_path_factory.mktemp("files"))
    tiny.save_model(path / "model", tied=False)
    return path


def coded(folder: Path, output: str, **quantize: Any) -> RunConfig:
    """Return the settings of a tiny run on an NF4 base with a head in codes, of which slabs of two rows can be made."""
    settings = config(folder, output=output).model_dump(mode="json")
    return RunConfig(**{**settings, "quantize": {"head": "nf4", "double_quant": False, **quantize}})


@pytest.fixture(scope="module")
def trained(folder: Path) -> Finetuned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "ROWS", 100)  # of a vocabulary of 260
        return finetune(coded(folder, "trained"))


def test_it_learns_and_says_what_the_codes_change(trained: Finetuned) -> None:
    run = RunDir(trained.run)
    steps = [event["loss"] for event in run.events() if event["kind"] == "step"]
    assert trained.eval_loss is not None
    assert trained.eval_before is not None
    assert trained.eval_loss < 0.8 * trained.eval_before
    assert steps[-1] < 0.8 * steps[0]
    notes = [event["text"] for event in run.events() if event["kind"] == "note"]
    assert notes[0].startswith("14 layers stored in nf4, the output head in nf4, 4.500 bits per weight")
    assert notes[1].startswith("the output head is stored in nf4, which changes the logits: over ")
    found = run.manifest()["output_head"]
    assert found["says"] == notes[1]
    assert 0 < found["change"]["mean"] < found["change"]["largest"]
    assert notes[1] in page.page(run).replace("&#x27;", "'")
    variants: Any = compare.load(None, [str(trained.run)], device="cpu").model
    assert isinstance(variants.get_base_model().lm_head, CodedLinear)


def test_the_change_is_that_of_both_models_logits(folder: Path) -> None:
    how = {"double_quant": False}
    model = load_model(folder / "model", device="cpu", quantize={**how, "head": "nf4"})
    wide = load_model(folder / "model", device="cpu", quantize=how)
    ids = list(range(40, 90))
    found = coded_head.change(model, str(folder / "model"), None, ids)
    assert found is not None
    assert found.change is not None
    with torch.no_grad():
        before, after = (m(input_ids=torch.tensor([ids])).logits[0] for m in (wide, model))
    off = (after - before).abs()
    for measured, expected in (
        (found.change.largest, off.amax()),
        (found.change.mean, off.mean()),
        (found.change.kl, mean_kl(before, after)),
        (found.change.same_top1, (before.argmax(-1) == after.argmax(-1)).float().mean()),
    ):
        assert measured == pytest.approx(float(expected), rel=1e-3)  # fp32 products of two ways to form the weight
    assert coded_head.change(wide, str(folder / "model"), None, ids) is None


def test_a_checkpoint_of_other_names_is_told_in_plain_words(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder / "model", device="cpu", quantize=QuantConfig(head="int8"))
    tensors = load_file(folder / "model/model.safetensors")
    renamed = {key.replace("lm_head", "output"): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "model/config.json").read_bytes())
    found = coded_head.change(model, str(tmp_path), None, [1, 2, 3])
    assert str(found) == (
        "the output head is stored in int8, which changes the logits; by how much is not measured: the checkpoint "
        "holds no such weight in 16 or 32 bits"
    )


def test_a_merge_starts_from_the_decoded_head(trained: Finetuned, folder: Path, tmp_path: Path) -> None:
    data = str(folder / "data.jsonl")
    merged = merge(str(trained.run), tmp_path / "merged", dtype="fp32", data=data)
    by_way = {candidate.into: candidate for candidate in merged.candidates}
    assert by_way.keys() == {"16bit", "dequantized", "nf4"}
    assert merged.trained_on == "nf4, its output head in nf4"
    assert merged.into == "dequantized"
    assert by_way["dequantized"].kl < 1e-6  # the same fp32 weights, the decoded head's included
    variants: Any = compare.load(None, [str(trained.run)], device="cpu").model
    expected = CodedBase(variants.get_base_model().lm_head).dense(torch.float32)
    again: Any = load_model(tmp_path / "merged", device="cpu")
    assert torch.equal(again.lm_head.weight, expected)
    merge(str(trained.run), tmp_path / "nf4", into="nf4", data=data, force=True)
    assert isinstance(load_model(tmp_path / "nf4", device="cpu").lm_head, CodedLinear)


def test_a_head_of_another_format_is_not_merged_into_codes(folder: Path, tmp_path: Path) -> None:
    run = finetune(coded(folder, "eight", head="int8")).run
    with pytest.raises(ConfigError, match=r"into 'nf4' .*a base in nf4, its output head in int8.*auto, 16bit, dequant"):
        merge(str(run), tmp_path / "merged", into="nf4")


def test_every_check_passes(folder: Path) -> None:
    answers = {answer.name: answer.status for answer in check.check(coded(folder, "checked")).checks}
    assert set(answers.values()) == {"passed"}, answers


def test_a_tied_head_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is its embedding table"):
        finetune(coded(make_files(tmp_path), "run"))
    assert not (tmp_path / "run").exists()
