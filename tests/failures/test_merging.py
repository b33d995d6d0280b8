"""Silent failures of merging: an update that rounding eats, a base that the adapter never saw. Each is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decal import LoraConfig, get_peft_model, load_model
from decal.errors import DecalError
from decal.recipes.finetune import finetune
from decal.recipes.merge import Merged, merge
from decal.spec import RunConfig
from tests import models
from tests.failures.page import told
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def tuned(folder: Path, output: str, quantize: str | None, **train: Any) -> str:
    """Train a tiny run and return its folder."""
    settings = config(folder, output=output, **train).model_dump(mode="json")
    return str(finetune(RunConfig(**{**settings, "quantize": quantize})).run)


def test_13_a_timid_update_in_bf16(folder: Path, tmp_path: Path) -> None:
    timid = tuned(folder, "timid", None, lr=1e-5)
    with pytest.raises(DecalError) as error:
        merge(timid, tmp_path / "merged", dtype="bf16")
    told("13a", error.value)
    assert not (tmp_path / "merged").exists()


def test_14_a_merge_into_nf4_that_erases_the_adapter(folder: Path, tmp_path: Path) -> None:
    timid = tuned(folder, "timid-nf4", "nf4", lr=2e-5)
    with pytest.raises(DecalError) as error:
        merge(timid, tmp_path / "merged", into="nf4")
    told("14a", error.value)


def by_base(merged: Merged) -> dict[str, float]:
    """Return the KL of each way of merging, in its best dtype."""
    best: dict[str, float] = {}
    for candidate in merged.candidates:
        best[candidate.into] = min(candidate.kl, best.get(candidate.into, candidate.kl))
    return best


def test_15_every_base_is_measured_and_the_one_that_was_trained_on_wins(folder: Path, tmp_path: Path) -> None:
    coded = tuned(folder, "coded", "nf4")
    merged = merge(coded, tmp_path / "merged")
    kl = by_base(merged)
    assert len(kl) > 1
    # 16-bit weights that the adapter never saw are far from what was trained, the decoded codes next to it
    assert kl[merged.into] < 0.1 * max(kl.values())


def test_16_unmerging_restores_every_bit() -> None:
    model = get_peft_model(
        models.make("llama", torch.bfloat16), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_23_a_tied_pair_stays_one_or_says_that_it_is_two(tmp_path: Path) -> None:
    tied = models.make("llama-tied", torch.float32)
    tied.save_pretrained(tmp_path / "base")
    with pytest.raises(DecalError) as error:
        get_peft_model(load_model(tmp_path / "base"), LoraConfig(target_modules=["lm_head"]))
    told("23a", error.value)
    both = LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(load_model(tmp_path / "base"), both)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    ids = models.tokens()
    expected = model.eval()(ids).logits
    plain: Any = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "merged")
    again: Any = load_model(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)  # fp32, one sum more
