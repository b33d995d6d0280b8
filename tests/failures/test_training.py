"""Silent failures of training: nothing trains, nothing moves, nothing is restored. Each fault is planted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decal import LoraConfig, get_peft_model
from decal.errors import DecalError
from decal.recipes.finetune import finetune
from decal.spec import RunConfig
from decal.training import losses, state
from tests import models
from tests.failures.page import told
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def test_9_a_frozen_adapter(folder: Path) -> None:
    settings = config(folder, output="frozen").model_dump(mode="json")
    settings["lora"]["inference_mode"] = True
    with pytest.raises(DecalError) as error:
        finetune(RunConfig(**settings))
    told("9a", error.value)


def test_25_an_adapter_on_the_head_trains_and_the_loss_says_how() -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules=["lm_head"]))
    notes: list[str] = []
    loss = losses.sft(model, notes.append)
    ids = models.tokens()
    from decal.data.batch import Batch

    summed, _ = loss(model, Batch(input_ids=ids, labels=ids, position_ids=None))
    summed.backward()  # type: ignore[no-untyped-call]
    (gradient,) = [p.grad for name, p in model.named_parameters() if "lm_head.lora_B" in name]
    assert gradient is not None
    assert gradient.abs().sum() > 0
    told("25a", notes[0])


def test_28_a_resume_of_what_has_changed(folder: Path) -> None:
    finetune(config(folder, output="resumed", steps=4, save_every=2))
    with pytest.raises(DecalError) as settings:
        finetune(config(folder, output="resumed", steps=4, save_every=2, seed=1), resume=True)
    told("28a", settings.value)
    rows = folder / "data.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("sun", "sum"))
    try:
        with pytest.raises(DecalError) as data:
            finetune(config(folder, output="resumed", steps=4, save_every=2), resume=True)
    finally:
        rows.write_text(before)
    told("28b", data.value)


def test_28_a_checkpoint_without_its_optimizer(folder: Path) -> None:
    finetune(config(folder, output="cut", steps=4, save_every=2))
    (folder / "cut" / "checkpoints" / "step-4" / state.OPTIMIZER).unlink()
    with pytest.raises(DecalError) as error:
        finetune(config(folder, output="cut", steps=4, save_every=2), resume=True)
    told("28c", error.value)
