"""Packing: what goes into a row, and that no sample sees another there."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM

from decal.data.batch import IGNORE, Batch
from decal.data.encode import Encoder
from decal.data.ledger import Tally
from decal.data.mask import Sample
from decal.data.pack import best_fit, collate
from decal.data.shapes import Chat, Turn
from decal.spec import DataConfig
from tests.data.chat_styles import tokenizer

VOCABULARY = 40
EOS = 2


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


def sample(seed: int, length: int, prompt: int = 2) -> Sample:
    ids = [random.Random(seed * 100 + i).randrange(3, VOCABULARY) for i in range(length - 1)] + [EOS]
    return Sample(ids=ids, labels=[IGNORE] * prompt + ids[prompt:])


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return out


def loss_sum(model: Any, batch: Batch) -> Tensor:
    scores = logits(model, batch)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(scores, batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("room", [16, 50])
def test_best_fit_puts_every_sample_in_one_row(room: int) -> None:
    draw = random.Random(1)
    lengths = [draw.randint(1, room) for _ in range(400)]
    rows = best_fit(lengths, room)
    assert sorted(index for row in rows for index in row) == list(range(400))
    assert all(sum(lengths[i] for i in row) <= room for row in rows)
    assert rows == best_fit(lengths, room)
    assert len(rows) <= -(-sum(lengths) // room) * 11 / 9 + 1


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    assert best_fit([4, 6, 3, 7, 10], 10) == [[4], [3, 2], [1, 0]]
    assert best_fit([], 10) == []


def test_a_neighbour_never_reaches_into_a_sample(model: Any) -> None:
    """Features 22: swap the neighbours in a packed row; the sample's logits stay."""
    kept = sample(1, 9)
    first = collate([[sample(2, 7), kept, sample(3, 5)], [sample(4, 6)]], pad_id=0)
    second = collate([[sample(5, 7), kept, sample(6, 5)], [sample(7, 11)]], pad_id=0)
    assert first.position_ids is not None
    assert first.position_ids[0].tolist() == [*range(7), *range(9), *range(5)]
    assert first.position_ids[1].tolist() == [*range(6), *range(15)]
    ours, swapped = logits(model, first)[0, 7:16], logits(model, second)[0, 7:16]
    assert torch.allclose(ours, swapped, rtol=0, atol=1e-6)
    alone = logits(model, collate([[kept]], pad_id=0))[0]
    assert torch.allclose(ours, alone, rtol=0, atol=1e-5)  # fp32, another order of sums
    leaking = Batch(input_ids=first.input_ids, labels=first.labels, position_ids=None)
    assert (logits(model, leaking)[0, 7:16] - alone).abs().max() > 0.01  # without the positions they would leak


def test_packed_loss_is_the_sum_of_the_samples_losses(model: Any) -> None:
    samples = [sample(seed, length) for seed, length in enumerate([9, 5, 2, 7, 12])]
    packed = collate([samples[:3], samples[3:]], pad_id=EOS)
    alone = [collate([[one]], pad_id=EOS) for one in samples]
    assert packed.loss_tokens == sum(batch.loss_tokens for batch in alone)
    torch.testing.assert_close(loss_sum(model, packed), torch.stack([loss_sum(model, b) for b in alone]).sum())


def test_unpacked_rows_need_no_positions(model: Any) -> None:
    samples = [sample(1, 9), sample(2, 4)]
    batch = collate([[one] for one in samples], pad_id=EOS)
    assert batch.position_ids is None
    assert batch.input_ids.shape == (2, 9)
    alone = sum(loss_sum(model, collate([[one]], pad_id=0)) for one in samples)
    torch.testing.assert_close(loss_sum(model, batch), alone)


def test_nothing_predicts_a_samples_first_token() -> None:
    ids = [5, 6, 7]
    batch = collate([[Sample(ids=ids, labels=ids), Sample(ids=ids, labels=ids)]], pad_id=0)
    assert batch.labels.tolist() == [[IGNORE, 6, 7, IGNORE, 6, 7]]


@pytest.mark.parametrize("packing", [False, True])
def test_eos_as_padding_is_still_learnt(packing: bool) -> None:
    """Features 17: transformers' collator takes every eos out of the loss where eos is the pad token; ours cannot."""
    maker = tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>")
    turns = [Turn(role="user", content="Hello"), Turn(role="assistant", content="Hello there")]
    longer = [turns[0], Turn(role="assistant", content="Hello there, user, how can I help you today?")]
    encoder = Encoder(DataConfig(path="none"), maker)
    assert encoder.pad_id == maker.eos_token_id
    samples = list(encoder.encode([(1, Chat(turns=tuple(turns))), (2, Chat(turns=tuple(longer)))], Tally()))
    rows = [[samples[1]], [samples[0], samples[0]]] if packing else [[one] for one in samples]
    batch = collate(rows, pad_id=encoder.pad_id)
    assert int((batch.labels == maker.eos_token_id).sum()) == sum(len(row) for row in rows)
    assert int((batch.input_ids == maker.eos_token_id).sum()) > sum(len(row) for row in rows)  # there is padding
    maker.pad_token = maker.eos_token
    theirs = DataCollatorForLanguageModeling(maker, mlm=False)([{"input_ids": one.ids} for one in samples])
    assert int((theirs["labels"] == maker.eos_token_id).sum()) == 0
