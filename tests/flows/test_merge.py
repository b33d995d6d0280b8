"""A merge is measured in every dtype, refused on another base, and whole or not there."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from decal.errors import AdapterError, RunError
from decal.evaluate.closeness import Tally, logits_of, mean_kl, perplexity
from decal.files import checkpoint
from decal.model.load import load_model
from decal.recipes.finetune import Finetuned, finetune
from decal.recipes.merge import PROOF_TOKENS, LostUpdate, merge
from tests.integration import tiny
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Finetuned:
    return finetune(config(folder))


def test_every_dtype_is_measured_and_the_stored_one_written(folder: Path, trained: Finetuned, tmp_path: Path) -> None:
    merged = merge(str(trained.run), tmp_path / "merged", data=str(folder / "data.jsonl"))
    by_dtype = {candidate.dtype: candidate for candidate in merged.candidates}
    assert by_dtype.keys() == {"float32", "bfloat16", "float16"}
    assert merged.dtype == "float32"
    assert by_dtype["float32"].kl < by_dtype["float16"].kl < by_dtype["bfloat16"].kl  # 23, 10 and 7 bits of fraction
    assert merged.agreement.kl == pytest.approx(by_dtype["float32"].kl, abs=1e-9)
    assert 100 < merged.agreement.tokens <= PROOF_TOKENS
    narrow = merge(str(trained.run), tmp_path / "narrow", dtype="fp16")
    assert [candidate.dtype for candidate in narrow.candidates] == ["float16"]
    assert load_model(tmp_path / "narrow", dtype="auto").get_parameter("lm_head.weight").dtype == torch.float16


def test_another_base_is_refused_by_its_weights(folder: Path, trained: Finetuned, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny.save_model(other)
    model: Any = load_model(other, device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1e-3
    model.save_pretrained(other)
    with pytest.raises(AdapterError, match="trained on another base"):
        merge(str(trained.run), tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()
    assert merge(str(trained.run), tmp_path / "merged", base=str(other), force=True).path.is_dir()


def test_a_full_disk_leaves_nothing(trained: Finetuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")  # as it does

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"could not be written.*No space left"):
        merge(str(trained.run), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_padded_rows_in_one_pass_equal_each_row_alone(folder: Path) -> None:
    model = load_model(folder / "model", device="cpu")
    rows = [torch.arange(3, 3 + n) for n in (9, 4, 17)]
    alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows]).detach()
    together = logits_of(model, rows)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # fp32 sums in another order
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in rows]
    assert perplexity(together, rows) == pytest.approx(torch.tensor(sum(losses) / 27).exp().item(), rel=1e-5)


def test_measures_are_their_formulas() -> None:
    p, q = torch.randn(700, 20), torch.randn(700, 20)
    expected = F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), log_target=True, reduction="batchmean")
    assert mean_kl(p, q) == pytest.approx(expected.item(), rel=1e-5)
    W, change = torch.randn(600, 40), torch.randn(600, 40) / 300
    tally = Tally()
    tally.add(W, change, lambda weight: weight.bfloat16())
    written = (W + change).bfloat16().double() - W.bfloat16().double()
    survived = (written * change).sum() / (change.double() ** 2).sum()
    assert tally.rounding().survived == pytest.approx(survived.item(), rel=1e-5)  # fp32 sums over 256 rows at a time
    assert tally.rounding().unchanged == pytest.approx((written == 0).double().mean().item(), rel=1e-6)


def test_a_merge_of_infinities_is_refused(folder: Path, tmp_path: Path) -> None:
    """In fp16 a weight above 65,504 is infinite: logits that are NaN must not pass for a perfect agreement."""
    base = tmp_path / "base"
    shutil.copytree(folder / "model", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2.0**24
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2.0**-24
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = config(folder, output=str(tmp_path / "run"), steps=2).model_copy(update={"model": str(base)})
    run = str(finetune(settings).run)
    with pytest.raises(LostUpdate) as refused:
        merge(run, tmp_path / "merged", dtype="fp16")
    assert refused.value.candidates[0].kl == math.inf
    merged = merge(run, tmp_path / "merged")
    assert merged.proven
    (Path(run) / "adapter" / "decal.json").unlink()
    assert not merge(run, tmp_path / "again").proven
