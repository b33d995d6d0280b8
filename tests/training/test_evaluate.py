"""Mean loss per token and perplexity over an evaluation set."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from decal.api import get_peft_model
from decal.data import pack
from decal.data.batch import IGNORE, Batch
from decal.data.mask import Sample
from decal.errors import DataError, RunError
from decal.evaluate.loss import evaluate
from decal.spec import LoraConfig
from decal.training.losses import SFT
from tests import models


def samples() -> list[Sample]:
    made = []
    for seed, (length, learnt) in enumerate([(4, 1), (30, 29), (12, 3), (20, 8), (6, 5)]):
        ids = models.tokens(1, length, seed)[0].tolist()
        made.append(Sample(ids=ids, labels=[IGNORE] * (length - learnt) + ids[length - learnt :]))
    return made


def rows(size: int) -> list[Batch]:
    whole = samples()
    return [pack.collate([[s] for s in whole[i : i + size]], pad_id=0) for i in range(0, len(whole), size)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_is_the_mean_over_all_tokens_however_they_are_batched(size: int) -> None:
    model = models.make("llama")
    total, count = 0.0, 0
    for s in samples():
        logits = model(torch.tensor([s.ids])).logits[0].detach()
        total += F.cross_entropy(logits[:-1], torch.tensor(s.labels[1:]), reduction="sum").item()
        count += sum(label != IGNORE for label in s.labels)
    measured = evaluate(model, rows(size), SFT(chunked=True))
    assert measured.count == count == 46
    assert measured.loss == pytest.approx(total / count, rel=1e-10)
    assert measured.perplexity == pytest.approx(math.exp(total / count), rel=1e-9)


def test_dropout_is_off_and_every_module_gets_its_own_mode_back() -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"], lora_dropout=0.9))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    model.get_base_model().lm_head.eval()  # one that the user has put into another mode
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    first, second = (evaluate(model, rows(2), SFT(chunked=True)).loss for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_modes_come_back_after_an_error_too() -> None:
    model = models.make("llama").train()
    crooked = [Batch(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 9999]]), position_ids=None)]
    with pytest.raises(DataError, match="outside the vocabulary"):
        evaluate(model, crooked, SFT(chunked=True))
    assert model.training


def test_no_graph_is_kept() -> None:
    seen = []
    plain = SFT(chunked=True)

    def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        total, count = plain(model, batch)
        seen.append(total.requires_grad)
        return total, count

    evaluate(models.make("llama"), rows(2), loss)
    assert seen == [False] * 3


def test_nothing_to_measure_and_broken_weights_are_errors() -> None:
    model, (batch,) = models.make("llama"), rows(5)
    empty = Batch(
        input_ids=batch.input_ids,
        labels=torch.full_like(batch.labels, IGNORE),
        position_ids=None,
    )
    with pytest.raises(DataError, match="no token to measure"):
        evaluate(model, [empty], SFT(chunked=True))
    assert evaluate(model, [empty, batch], SFT(chunked=True)).count == 46
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises(RunError, match="not finite"):
        evaluate(model, [batch], SFT(chunked=True))
