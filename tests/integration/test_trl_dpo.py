"""trl.DPOTrainer with a decal PeftModel: the reference is the adapter as it was at the start."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from decal import LoraConfig, PeftModel, get_peft_model
from tests.integration import tiny

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


def pairs() -> list[dict[str, Any]]:
    worse = [{"role": "assistant", "content": "I do not know."}]
    return [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": worse} for row in tiny.messages(16)
    ]


def wrapped(*, trained: bool) -> PeftModel:
    """Return a model with a new adapter, or (`trained`) with one that already changes the model."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=not trained)
    return get_peft_model(tiny.model(), lora, generator=torch.Generator().manual_seed(0))


def trainer(model: PeftModel, output: Path) -> Any:
    args = trl.DPOConfig(
        output_dir=str(output),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
    )
    return trl.DPOTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs()),
        processing_class=tiny.tokenizer(),
    )


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("trained", [False, True], ids=["new_adapter", "trained_adapter"])
def test_starts_at_ln_2_learns_and_leaves_the_reference_alone(trained: bool, tmp_path: Path) -> None:
    model = wrapped(trained=trained)
    start = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    run = trainer(model, tmp_path)
    run.train()
    # Policy and reference are the same function at step 0, so every margin is 0 and the loss is -log sigmoid(0).
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < 0.3
    state = model.state_dict()
    assert all(torch.equal(state[name.replace(".default", ".ref")], value) for name, value in start.items())
    assert all(not torch.equal(state[name], value) for name, value in start.items())
    assert model.active_adapter == "default"
    # TRL switches checkpointing off and on around each reference pass: that must not pile up hooks.
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(wrapped(trained=False), tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    rest = trainer(wrapped(trained=False), tmp_path / "cut")
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.model.state_dict().items())
