"""Batches: every sample once an epoch, another order each time, and resuming where one stood."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch

from decal.data.batch import Batch
from decal.data.batches import Batches, InOrder
from decal.data.mask import Sample
from decal.data.samples import Samples, Stream
from decal.errors import DataError

LENGTH = 16


def sample(number: int) -> Sample:
    """A sample of 2 to 9 tokens that carries its number in each."""
    return Sample(ids=[number] * (2 + number % 8), labels=[number] * (2 + number % 8))


SAMPLES = Samples(sample(n) for n in range(1, 60))


def stream(epoch: int) -> Iterator[Sample]:
    order = torch.randperm(59, generator=torch.Generator().manual_seed(epoch)).tolist()
    return (SAMPLES[i] for i in order)


def make(source: Samples | Stream = SAMPLES, **options: Any) -> Batches:
    settings: dict[str, Any] = {"length": LENGTH, "micro_batch": 2, "accumulate": 3, "pad_id": 0, "seed": 5, **options}
    return Batches(source, **settings)


def numbers(step: tuple[Batch, ...]) -> list[int]:
    """The samples of a step, from the first token of each: position 0 and not padding."""
    found: list[int] = []
    for batch in step:
        for row in range(batch.input_ids.shape[0]):
            ids = batch.input_ids[row]
            if batch.position_ids is None:
                found.append(int(ids[0]))
            else:
                found += [int(t) for t in ids[batch.position_ids[row] == 0] if t]
    return found


def same(a: Sequence[tuple[Batch, ...]], b: Sequence[tuple[Batch, ...]]) -> bool:
    def key(step: tuple[Batch, ...]) -> Any:
        return [(x.input_ids.tolist(), x.labels.tolist(), x.position_ids is None) for x in step]

    return [key(step) for step in a] == [key(step) for step in b]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_has_every_sample_once(packing: bool, streaming: bool) -> None:
    batches = make(Stream(stream) if streaming else SAMPLES, packing=packing)
    first, second = list(batches.epoch()), list(batches.epoch())
    for steps in (first, second):
        assert sorted(n for step in steps for n in numbers(step)) == list(range(1, 60))
        assert all(len(step) == 3 for step in steps[:-1])
        assert all(batch.input_ids.shape[1] <= LENGTH for step in steps for batch in step)
        assert batches.steps_per_epoch in (None, len(steps))
    assert not same(first, second)
    assert (batches.steps_per_epoch is None) is streaming
    if not packing:
        assert len(first) == 10
        assert len(first[-1]) == 3
        assert len(first[-1][-1].input_ids) == 1


def test_the_seed_decides_the_order() -> None:
    assert same(list(make().epoch()), list(make().epoch()))
    assert not same(list(make().epoch()), list(make(seed=6).epoch()))
    assert not same(list(make(seed=0).epoch()), list(make(seed=1).epoch()))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("done", [0, 1, 4, "epoch", 13])
def test_a_resumed_run_gets_exactly_the_same_batches(packing: bool, streaming: bool, done: int | str) -> None:
    def fresh() -> Batches:
        return make(Stream(stream) if streaming else SAMPLES, packing=packing)

    count = len(list(fresh().epoch())) if done == "epoch" else int(done)
    whole = list(islice(fresh(), count + 12))
    first = fresh()
    steps = iter(first)
    for _ in range(count):
        next(steps)
    state = json.loads(json.dumps(first.state_dict()))
    second = fresh()
    second.load_state_dict(state)
    assert same(list(islice(second, 12)), whole[count:])


@pytest.mark.parametrize("change", [{"seed": 6}, {"micro_batch": 1}, {"packing": False}])
def test_other_batches_cannot_be_resumed(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="has changed since the checkpoint"):
        make(**change).load_state_dict(make().state_dict())


def test_an_empty_stream_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(DataError, match="no usable row"):
        next(iter(make(Stream(lambda epoch: iter(())))))


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_comes_in_one_order(packing: bool) -> None:
    batches = InOrder(SAMPLES, length=LENGTH, micro_batch=4, packing=packing, pad_id=0)
    first, second = [(b,) for b in batches], [(b,) for b in batches]
    assert same(first, second)
    assert len(first) == len(batches)
    assert sorted(n for step in first for n in numbers(step)) == list(range(1, 60))
    if not packing:
        assert numbers(first[0]) == [1, 2, 3, 4]


def test_samples_are_a_sequence() -> None:
    assert len(SAMPLES) == 59
    assert SAMPLES[-1] == sample(59)
    assert SAMPLES[1:3] == [sample(2), sample(3)]
    assert SAMPLES.length(7) == 2
    assert list(SAMPLES)[10] == sample(11)
    with pytest.raises(IndexError):
        SAMPLES[59]
