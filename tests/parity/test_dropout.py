"""lora_dropout drops the adapter's input only, and as PEFT does: the same seed gives the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from decal.api import get_peft_model
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def one_linear(**options: Any) -> tuple[PeftModel, Any]:
    """Return decal's and PEFT's view of a model that is a single linear layer, in training."""
    ours = get_peft_model(nn.Sequential(nn.Linear(24, 24).double()), LoraConfig(target_modules=["0"], **options))
    base = nn.Sequential(nn.Linear(24, 24).double())
    base.load_state_dict({"0.weight": ours.base_model.model[0].weight, "0.bias": ours.base_model.model[0].bias})
    theirs = oracle.theirs_of(base, {"target_modules": ["0"], **options})
    oracle.copy_weights(ours, theirs, randomize=0.1)
    return ours.train(), theirs.train()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_one_seed_gives_pefts_numbers(options: dict[str, Any]) -> None:
    ours, theirs = one_linear(lora_dropout=0.4, **options)
    x = torch.randn(5, 24, dtype=torch.float64)
    outputs, gradients = [], []
    for model in (ours, theirs):
        torch.manual_seed(11)
        y = model(x)
        model.zero_grad()
        (y * x).sum().backward()
        outputs.append(y.detach())
        gradients.append({name: p.grad for name, p in oracle.trained(model).items() if p.grad is not None})
    torch.testing.assert_close(*outputs, **oracle.FP64)
    oracle.assert_same(*gradients, **oracle.FP64)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_whole_model_draws_in_pefts_order(options: dict[str, Any]) -> None:
    ours, theirs = oracle.pair("llama", lora_dropout=0.4, **TARGETS, **options)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        results.append(oracle.gradients(model, models.tokens()))
    oracle.assert_same(*results, **oracle.FP64)


def test_without_dropout_training_is_evaluation() -> None:
    ours, _ = oracle.pair("llama", lora_dropout=0.0, **TARGETS)
    ids = models.tokens()
    assert torch.equal(oracle.logits(ours.train(), ids), oracle.logits(ours.eval(), ids))


def test_dropped_changes_have_the_right_mean_and_the_base_is_never_dropped() -> None:
    """E[dropout(x)] = x, so the mean over n draws is within 5 standard errors of the undropped change."""
    ours, _ = one_linear(lora_dropout=0.5)
    x = torch.randn(1, 24, dtype=torch.float64)
    base = ours.base_model.model[0].base_layer(x)
    draws = ours(x.expand(20_000, -1)) - base
    exact = ours.eval()(x) - base
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0) - exact[0]).abs().le(5 * error).all()
    with torch.no_grad():
        for p in oracle.trained(ours).values():
            p.zero_()
    assert torch.equal(ours.train()(x), base)


def test_other_adapters_are_dropped_each_by_its_own_rate() -> None:
    ours, _ = one_linear(lora_dropout=0.4)
    ours.add_adapter("still", LoraConfig(target_modules=["0"], init_lora_weights=False))
    ours.set_adapter("still")
    x = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(ours(x), ours(x))
    ours.set_adapter("default")
    assert not torch.equal(ours(x), ours(x))


def test_a_dropped_adapter_in_a_mixed_batch() -> None:
    """Way 3 with dropout: rows of the base stay exact, the others are dropped."""
    ours, _ = oracle.pair("llama", lora_dropout=0.5, **TARGETS)
    ids = models.tokens()
    ours.train()
    first = oracle.logits(ours, ids, adapter_names=["default", "__base__", "default"])
    second = oracle.logits(ours, ids, adapter_names=["default", "__base__", "default"])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
