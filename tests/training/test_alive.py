"""Parameters that the first backward pass did not reach."""

from __future__ import annotations

import pytest
import torch

from decal.api import get_peft_model
from decal.errors import RunError
from decal.spec import LoraConfig
from decal.training.alive import without_gradient
from tests import models


def adapted(kind: str = "llama", **settings: object) -> torch.nn.Module:
    model = get_peft_model(models.make(kind, torch.float32), LoraConfig(target_modules=["q_proj"], r=2, **settings))
    ids = models.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": False}, {"bias": "all"}])
def test_a_fresh_adapter_is_alive_although_a_has_no_gradient_yet(settings: dict[str, object]) -> None:
    assert without_gradient(adapted("llama-biased", **settings)) == []


def test_a_fresh_embedding_adapter_is_alive() -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules=["embed_tokens"]))
    ids = models.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert without_gradient(model) == []


def test_parts_that_were_not_reached_are_named() -> None:
    model = adapted()
    names = {n: p for n, p in model.named_parameters() if p.requires_grad and "layers.1" in n}
    for parameter in names.values():
        parameter.grad = None
    assert sorted(without_gradient(model)) == sorted(names)
    assert len(names) == 2
    for parameter in names.values():
        parameter.grad = torch.zeros_like(parameter)
    assert sorted(without_gradient(model)) == sorted(names)


def test_nothing_reached_is_an_error_that_names_parameters() -> None:
    model = adapted()
    for zero in (True, False):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if zero else None
        with pytest.raises(RunError, match=r"none of the 4 trainable.*q_proj\.lora_A"):
            without_gradient(model)


def test_gradients_that_are_not_finite_are_gradients() -> None:
    model = adapted()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)
    assert without_gradient(model) == []
