"""Parameter groups against PEFT's LoRA+, schedules against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from decal.cli import train
from decal.errors import ConfigError
from decal.spec import TrainConfig
from decal.training import optim
from decal.training.adamw8bit import AdamW8bit
from tests import models


def lora(**settings: Any) -> nn.Module:
    """Return PEFT's own adapted model: the oracle's input, and parameter names that decal must sort."""
    config: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "up_proj"], **settings}
    model: nn.Module = peft.get_peft_model(models.make("llama", torch.float32), peft.LoraConfig(**config))
    return model


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return {parameter: (learning rate, decay)}."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["q_proj", "embed_tokens"]])
def test_loraplus_groups_equal_pefts(targets: list[str]) -> None:
    model = lora(target_modules=targets, modules_to_save=["norm"])
    ours = optim.build(model, TrainConfig(lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.1))
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=1e-3,  # PEFT's default of 1e-6 all but freezes them; decal keeps lr
        weight_decay=0.1,
    )
    expected = rates(theirs, model)
    # PEFT's list of norm classes lacks Llama's RMSNorm, so its only rule for norms ("bias" in the name) decays them.
    expected = {n: (lr, 0.0 if "norm" in n else decay) for n, (lr, decay) in expected.items()}
    assert rates(ours, model) == expected
    assert len(expected) == sum(p.requires_grad for p in model.parameters())


def test_biases_norms_and_magnitudes_are_not_decayed_and_all_else_is() -> None:
    model = lora(use_dora=True, bias="lora_only")
    base = models.make("llama-biased", torch.float32)
    for module in (model, base):
        decayed = rates(optim.build(module, TrainConfig(weight_decay=0.1)), module)
        assert decayed
        for name, (lr, decay) in decayed.items():
            assert lr == TrainConfig().lr
            assert decay == (0.0 if any(w in name for w in ("bias", "norm", "magnitude")) else 0.1), name


def test_only_trainable_parameters_are_moved_and_by_one_kernel() -> None:
    model = lora()
    optimizer = optim.build(model, TrainConfig(betas=(0.8, 0.95)))
    assert set(rates(optimizer, model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.8, 0.95)


KINDS = ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit")


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_has_the_same_groups_and_pages_only_on_a_card(kind: str) -> None:
    model, said = lora(), list[str]()
    settings: dict[str, Any] = {"weight_decay": 0.1, "loraplus_lr_ratio": 4, "betas": (0.8, 0.95)}
    optimizer = optim.build(model, TrainConfig(optimizer=kind, **settings), say=said.append)
    assert rates(optimizer, model) == rates(optim.build(model, TrainConfig(**settings)), model)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    assert type(optimizer) is (AdamW8bit if kind.endswith("8bit") else torch.optim.AdamW)
    plain = kind.removeprefix("paged_")
    expected = [f"train.optimizer={kind} pages on a CUDA card only; here it is {plain}, with equal results"]
    assert said == (expected if kind != plain else [])


def test_the_settings_and_the_command_know_these_optimizers() -> None:
    assert TrainConfig.model_fields["optimizer"].annotation.__args__ == KINDS  # type: ignore[union-attr]
    assert tuple(kind.value for kind in train.Optimizer) == KINDS
    with pytest.raises(ConfigError, match=r"'optimizer' must be.*'paged_adamw8bit'"):
        TrainConfig(optimizer="adam8bit")


ORACLES: dict[str, Callable[..., Any]] = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("name", sorted(optim.SCHEDULES))
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 10), (1, 2), (7, 50), (0, 1)])
def test_schedules_equal_transformers(name: str, warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.7)
    scheduler = ORACLES[name](optimizer, warmup, steps)
    mine = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "initial_lr": 0.7}], lr=0.7)
    for step in range(steps):
        optim.set_lr(mine, optim.SCHEDULES[name](step, warmup, steps))
        assert mine.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_every_schedule_of_the_settings_is_here() -> None:
    assert set(TrainConfig.model_fields["schedule"].annotation.__args__) == set(optim.SCHEDULES)  # type: ignore[union-attr]
