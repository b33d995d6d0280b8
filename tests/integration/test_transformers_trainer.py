"""transformers.Trainer with a decal PeftModel."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from decal import LoraConfig, PeftModel, get_peft_model
from tests.integration import tiny

datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")  # transformers saves adapters alone only where PEFT is installed


def wrapped() -> PeftModel:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.1)
    return get_peft_model(tiny.model(), lora, generator=torch.Generator().manual_seed(1))


def rows(count: int) -> Any:
    tokenizer = tiny.tokenizer()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in tiny.messages(count)]
    return datasets.Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])


def trainer(model: PeftModel, output: Path, **settings: Any) -> Trainer:
    values = {
        "output_dir": str(output),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**values),
        train_dataset=rows(16),
        eval_dataset=rows(4),
        data_collator=DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False),
    )


def losses(run: Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_trains_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(wrapped(), tmp_path)
    run.train()
    assert losses(run)[-1] < 0.85 * losses(run)[0]
    saved = set(tiny.files(tmp_path / "checkpoint-8"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & saved


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(wrapped(), tmp_path / "whole", activation_checkpointing=True)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    rest = trainer(wrapped(), tmp_path / "cut", activation_checkpointing=True)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.model.state_dict().items())


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path) -> None:
    """With a learning rate that spoils the model later, the last step is not the best."""
    run = trainer(
        wrapped(),
        tmp_path,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
    )
    run.train()
    evaluated = {line["step"]: line["eval_loss"] for line in run.state.log_history if "eval_loss" in line}
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated.values()), rel=1e-5)


def test_isinstance_holds_only_for_models() -> None:
    import peft

    model = wrapped()
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, PeftModel)
    assert type(model) is PeftModel
    assert not isinstance(tiny.model(), peft.PeftModel)
