"""trl.SFTTrainer with a decal PeftModel: as TRL users know it, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

from decal import DecalError, LoraConfig, PeftModel, get_peft_model, load_model
from decal.errors import Unsupported
from tests.integration import tiny

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
BASE_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "config.json")


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )


def trainer(model: PeftModel, output: Path, **settings: Any) -> Any:
    """Return TRL's trainer with settings small enough for a CPU; TRL's default of checkpointing stays on."""
    values = {
        "output_dir": str(output),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_length": 128,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**values),
        train_dataset=datasets.Dataset.from_list(tiny.messages(16)),
        eval_dataset=datasets.Dataset.from_list(tiny.messages(4)),
        processing_class=tiny.tokenizer(),
    )


def wrapped(lora: LoraConfig | None = None, model: nn.Module | None = None) -> PeftModel:
    return get_peft_model(model or tiny.model(), lora or config(), generator=torch.Generator().manual_seed(1))


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def untied() -> LlamaForCausalLM:
    model = tiny.model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_trains_evaluates_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    model = wrapped()
    base = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    run = trainer(model, tmp_path / "run", save_strategy="steps", save_steps=4)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert losses(run)[-1] < 0.85 * losses(run)[0]
    assert run.evaluate()["eval_loss"] < 0.85 * before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())

    run.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "final"):
        assert set(tiny.files(folder)) >= ADAPTER
        assert not set(BASE_WEIGHTS) & set(tiny.files(folder))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            assert all(".lora_A." in key or ".lora_B." in key for key in file.keys())  # noqa: SIM118
    again = PeftModel.from_pretrained(tiny.model(), tmp_path / "final")
    batch = tiny.batch()
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    lora = config(lora_dropout=0.1)  # dropout: the generators must be restored, too
    whole = trainer(wrapped(lora), tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    rest = trainer(wrapped(lora), tmp_path / "cut", save_strategy="steps", save_steps=4)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    after, expected = factors(rest.model), factors(whole.model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_checkpointing_recomputes_and_changes_nothing(tmp_path: Path) -> None:
    runs = [
        trainer(wrapped(), tmp_path / str(on), max_steps=3, gradient_checkpointing=on, save_strategy="no")
        for on in (True, False)
    ]
    for run in runs:
        run.train()
    assert runs[0].model.is_activation_checkpointing
    layer = runs[0].model.get_base_model().model.layers[0]
    assert layer._gradient_checkpointing_func.keywords["context_fn"] == runs[0].model.switch.checkpoint_contexts
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize(
    "lora",
    [
        config(use_dora=True),
        config(init_lora_weights="pissa"),
        config(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        config(target_modules=["q_proj"], trainable_token_indices=tiny.tokenizer().convert_tokens_to_ids(["W", "e"])),
    ],
    ids=["dora", "pissa", "modules_to_save", "token_rows"],
)
def test_every_trainable_tensor_of_each_kind_moves(lora: LoraConfig, tmp_path: Path) -> None:
    model = wrapped(lora, untied())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    run = trainer(model, tmp_path, max_steps=3)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]


def test_packing_works(tmp_path: Path) -> None:
    run = trainer(wrapped(), tmp_path, max_steps=3, packing=True, max_length=64)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize(
    ("lora", "model"),
    [
        (config(target_modules=["q_proj", "lm_head"]), untied),
        (config(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), tiny.model),
        (config(target_modules=["q_proj"], trainable_token_indices=[40]), tiny.model),
    ],
    ids=["head", "tied_embedding", "tied_token_rows"],
)
def test_an_adapter_on_the_head_is_refused_by_name(lora: LoraConfig, model: Any, tmp_path: Path) -> None:
    """TRL multiplies by the head's stored weight: the adapter on it would be passed over."""
    run = trainer(wrapped(lora, model()), tmp_path)
    with pytest.raises(Unsupported, match=r"decal\.train"):
        run.train()


def test_a_16_bit_head_that_computes_in_fp32_is_refused_and_bf16_trains(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", torch.bfloat16)
    with pytest.raises(Unsupported, match=r"decal\.train"):
        trainer(wrapped(model=load_model(folder)), tmp_path / "refused").train()
    run = trainer(wrapped(model=load_model(folder)), tmp_path / "run", max_steps=3, bf16=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert all(value.dtype == torch.float32 for value in factors(run.model).values())


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecalError, match="reentrant"):
        trainer(wrapped(), tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True}).train()


def test_a_config_of_ours_as_peft_config_is_refused_by_trl(tmp_path: Path) -> None:
    """TRL would wrap the model with PEFT; decal's models are wrapped by decal.get_peft_model first."""
    with pytest.raises(TypeError, match="peft_config"):
        trl.SFTTrainer(
            model=tiny.model(),
            args=trl.SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
            train_dataset=datasets.Dataset.from_list(tiny.messages(4)),
            processing_class=tiny.tokenizer(),
            peft_config=config(),
        )
