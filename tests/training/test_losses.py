"""The SFT loss against transformers' own, and the decision when it may be computed in chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decal.api import get_peft_model
from decal.data import pack
from decal.data.batch import IGNORE, Batch
from decal.data.mask import Sample
from decal.model.load import compute_in_fp32
from decal.spec import LoraConfig
from decal.training import losses
from decal.training.head import why_not_chunked
from decal.training.losses import SFT
from tests import models

PLAIN = ["llama", "llama-tied", "qwen2", "mistral", "gemma", "gpt2", "gpt2-untied", "mixtral"]


def sample(length: int, seed: int, learnt: int) -> Sample:
    """Return a sample whose last `learnt` tokens are in the loss."""
    ids = models.tokens(1, length, seed)[0].tolist()
    return Sample(ids=ids, labels=[IGNORE] * (length - learnt) + ids[length - learnt :])


def packed() -> Batch:
    """Return two rows, one of them two samples."""
    return pack.collate([[sample(5, 1, 2), sample(7, 2, 3)], [sample(9, 3, 8)]], pad_id=0)


def own(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed loss of each sample run alone through the model's own loss."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch.input_ids)):
        assert batch.position_ids is not None
        starts = [*(batch.position_ids[row] == 0).nonzero().flatten().tolist(), batch.input_ids.shape[1]]
        for start, end in pairwise(starts):
            ids, labels = batch.input_ids[row : row + 1, start:end], batch.labels[row : row + 1, start:end]
            if (labels[:, 1:] != IGNORE).any():
                logits = model(input_ids=ids).logits
                total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", PLAIN)
def test_packed_chunked_loss_and_gradients_are_those_of_each_sample_alone(kind: str) -> None:
    exact = kind != "mixtral"  # torch's grouped product for experts knows no fp64
    model, batch = models.make(kind, torch.float64 if exact else torch.float32), packed()
    assert why_not_chunked(model) is None
    total, count = SFT(chunked=True)(model, batch)
    expected = own(model, batch)
    assert count == 2 + 3 + 8 == SFT(chunked=True).count(batch)
    # fp64: what differs is that transformers computes its RoPE tables in fp32
    torch.testing.assert_close(total.double(), expected, rtol=1e-10 if exact else 1e-5, atol=0)
    mine, theirs = gradients(model, total), gradients(model, expected)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=1e-8 if exact else 1e-3, atol=1e-10 if exact else 1e-5, msg=name
        )


def test_the_models_own_loss_gives_the_same_numbers() -> None:
    model, batch = models.make("llama"), packed()
    chunked, own_loss = SFT(chunked=True)(model, batch), SFT(chunked=False)(model, batch)
    assert chunked[1] == own_loss[1]
    torch.testing.assert_close(chunked[0].double(), own_loss[0].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [get_peft_model, peft.get_peft_model], ids=["decal", "peft"])
def test_adapters_get_the_gradients_of_the_models_own_loss(make: Any) -> None:
    config: Any = {"r": 4, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 8}
    kind = LoraConfig if make is get_peft_model else peft.LoraConfig
    model, batch = make(models.make("llama", torch.float32), kind(**config)), packed()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert why_not_chunked(model) is None
    mine = gradients(model, SFT(chunked=True)(model, batch)[0])
    theirs = gradients(model, SFT(chunked=False)(model, batch)[0])
    assert len(mine) == 2 * 2 * 2
    assert mine.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def _says(model: nn.Module) -> str:
    notes: list[str] = []
    loss = losses.sft(model, notes.append)
    assert not loss.chunked
    assert len(notes) == 1
    return notes[0]


def test_capped_logits_are_seen_even_where_the_cap_does_nothing_yet() -> None:
    model = models.make("gemma2", torch.float32)
    ids = models.tokens(1, 6)
    assert model(ids).logits.abs().max() < 10  # the cap is at 30: on these logits the two losses are almost equal
    assert "logits are not its head's output" in _says(model)


@pytest.mark.parametrize("name", ["Granite", "Cohere"])
def test_scaled_logits_are_seen(name: str) -> None:
    scale = {"Granite": {"logits_scaling": 1.5}, "Cohere": {"logit_scale": 0.9}}[name]
    model = models._causal(name, **scale).eval()
    assert "logits are not its head's output" in _says(model)


def test_an_adapted_head_is_seen_although_a_fresh_adapter_changes_nothing() -> None:
    for targets in (["lm_head"], ["q_proj", "lm_head"]):
        model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules=targets))
        assert "AdaptedLinear" in _says(model)
        gradient = gradients(model, SFT(chunked=False)(model, packed())[0])
        assert gradient["base_model.model.lm_head.lora_B.default.weight"].any()


def test_a_retrained_head_is_seen() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "ReplacedModule" in _says(get_peft_model(models.make("llama", torch.float32), config))


def test_a_loss_with_another_term_is_seen() -> None:
    model = models.make("mixtral", torch.float32)
    model.config.output_router_logits = True
    assert "not the cross entropy of its logits" in _says(model)


def test_a_model_without_a_vocabulary_head_is_seen() -> None:
    assert "head" in _says(models.make("classifier", torch.float32))


def test_the_test_leaves_the_model_as_it_was() -> None:
    model = models.make("llama", torch.float32)
    model.train()
    before, state = models.tokens(1, 6), torch.get_rng_state()
    logits = model(before).logits
    assert why_not_chunked(model) is None
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(before).logits, logits)


def test_a_16_bit_model_that_computes_in_fp32_keeps_the_chunked_loss() -> None:
    model, batch = models.make("llama", torch.bfloat16), packed()
    compute_in_fp32(model)
    assert why_not_chunked(model) is None
    chunked, plain = SFT(chunked=True)(model, batch)[0], SFT(chunked=False)(model, batch)[0]
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)


def test_a_bf16_model_keeps_the_chunked_loss() -> None:
    assert why_not_chunked(models.make("llama", torch.bfloat16)) is None
