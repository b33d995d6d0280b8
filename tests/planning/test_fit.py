"""What is offered where a run does not fit: the search against plain arithmetic, and what it offers counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from decal.planning import change, fit, memory
from decal.planning.fit import Fitting, Offer
from decal.planning.memory import Forecast, Known, Phase
from decal.planning.shapes import ACTIVATIONS, FROZEN, GRADIENTS, LOGITS, OPTIMIZER, PARTS, TRAINED, WORKSPACE, Counted
from decal.planning.wanted import Wanted
from tests.planning.tiny import save_config, save_size, wanted

MIB = 2**20
NO_WORK = Counted(blocks=[], first=0, last=0, parts={}, flops=0, moved=0, operations=0)


def by_arithmetic(asked: Wanted, known: Known | None = None) -> Forecast:
    """Stand in for counting: an 8B model's sizes in MiB, with edges that no straight line shows."""
    train, lora = asked.train, asked.lora
    adapter = 10 * lora.r * (0.3 if lora.target_modules == "attention" else 1.0)
    weights = 4000 if asked.quantize else 15000
    learnt = weights if asked.full else adapter
    moments = learnt * (0.5 if "8bit" in train.optimizer else 2)
    tokens = asked.tokens
    parts = {
        FROZEN: 0 if asked.full else weights,
        TRAINED: learnt,
        GRADIENTS: learnt,
        OPTIMIZER: moments,
        ACTIVATIONS: tokens * (0.3 if train.gradient_checkpointing else 4),
        LOGITS: 200,
        WORKSPACE: min(400, tokens / 4) + (300 if asked.length > 1500 else 0),
    }
    training = Phase(name="training", parts=dict.fromkeys(PARTS, 0) | {k: int(v * MIB) for k, v in parts.items()})
    rest = tuple(Phase(name=name, parts=dict.fromkeys(PARTS, 0)) for name in ("evaluation", "saving", "merging"))
    return Forecast(
        wanted=asked,
        phases=(training, *rest),
        work=NO_WORK,
        trainable=1,
        parameters=1,
        positions=None,
        dtype_assumed=False,
    )


def asked(*, length: int = 4096, rank: int = 16, **train: object) -> Wanted:
    lora = {"r": rank, "lora_alpha": 2 * rank}
    return wanted(Path("none"), length=length, device="cuda", lora=lora, **{"micro_batch": 4, **train})


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "forecast", by_arithmetic)


def tried_in_order(run: Wanted, way: Fitting) -> bool:
    """Whether a way does not cut rows before a micro-batch has one alone; such ways come last."""
    tried = way.forecast.wanted
    return tried.length == run.length or tried.train.micro_batch == 1


def offered(run: Wanted, room: int) -> Offer:
    """Return the offer for a run in `room` MiB, and hold it to what every offer promises."""
    offer = fit.offer(by_arithmetic(run), room * MIB)
    touched = [{name for one in way.changes for name in one.settings} for way in offer.fittings]
    for way in offer.fittings:
        tried = run
        for one in way.changes:
            tried = one.of(tried)
        assert by_arithmetic(tried).needed == way.forecast.needed <= room * MIB
        if tried.length < run.length:
            assert tried.length % 128 == 0
            assert by_arithmetic(replace(tried, length=tried.length + 128)).needed > room * MIB
    assert not any(
        a <= b and one.forecast.wanted.length >= other.forecast.wanted.length
        for a, one in zip(touched, offer.fittings, strict=True)
        for b, other in zip(touched, offer.fittings, strict=True)
        if one is not other
    )
    costs = [sum(one.cost for one in way.changes) for way in offer.fittings if tried_in_order(run, way)]
    assert costs == sorted(costs)
    return offer


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("room", [50_000, 24_000, 20_000, 17_000, 12_000, 8_000, 6_000])
def test_three_ways_are_offered_where_there_are_three(room: int) -> None:
    offer = offered(asked(), room)
    assert len(offer.fittings) == 3
    assert not offer.fewer


@pytest.mark.usefixtures("arithmetic")
def test_as_many_changes_are_joined_as_it_takes() -> None:
    """In 5,300 MiB a run of rank 64 fits with all changes alone."""
    offer = offered(asked(rank=64), 5_300)
    assert all(len(way.changes) > 3 for way in offer.fittings)
    assert offer.fittings


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(("rank", "alpha"), [(64, 16), (24, 16)])
def test_a_smaller_adapter_keeps_its_scale(rank: int, alpha: int) -> None:
    (one,) = [one for one in change.changes(asked(rank=rank)) if "lora.r" in one.settings]
    assert one.settings == {"lora.r": 8, "lora.lora_alpha": alpha}  # alpha / r was 2


@pytest.mark.usefixtures("arithmetic")
def test_full_fine_tuning_is_offered_an_adapter() -> None:
    ways = [way.settings for way in offered(asked(method="full", length=512), 30_000).fittings]
    assert any("train.method=lora" in way for way in ways)


@pytest.mark.usefixtures("arithmetic")
def test_what_fits_in_no_way_is_told_with_the_least() -> None:
    offer = offered(asked(), 4_000)
    assert not offer.fittings
    assert offer.least is not None
    smallest = asked(length=128, micro_batch=1, optimizer="adamw8bit", gradient_checkpointing=True, rank=8)
    lora = smallest.lora.model_copy(update={"target_modules": "attention"})
    coded = offer.least.forecast.wanted.quantize
    assert coded is not None
    assert offer.least.forecast.needed == by_arithmetic(replace(smallest, lora=lora, quantize=coded)).needed
    assert "data.max_length=128" in offer.least.settings


@pytest.mark.usefixtures("arithmetic")
def test_a_search_counts_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Wanted]()

    def counting(run: Wanted, known: Known | None = None) -> Forecast:
        made.append(run)
        return by_arithmetic(run)

    monkeypatch.setattr(memory, "forecast", counting)
    for room in range(4_500, 60_000, 2_500):
        made.clear()
        fit.offer(by_arithmetic(asked()), room * MIB)
        assert len(made) <= fit.COUNTED + 6  # and the last candidate's lengths, and the share of recomputing


@pytest.mark.slow
def test_what_is_offered_for_a_model_is_counted(tmp_path: Path) -> None:
    run = wanted(save_config(tmp_path, "llama"), length=512, micro_batch=4)
    found = memory.forecast(run)
    room = found.needed - found.phase("training").peak // 3  # a tiny model's tensors are little beside the process
    offer = fit.offer(found, room, count=2)
    assert len(offer.fittings) == 2
    for way in offer.fittings:
        tried = run
        for one in way.changes:
            tried = one.of(tried)
        assert memory.forecast(tried).needed == way.forecast.needed <= room


@pytest.mark.slow
def test_a_large_model_fits_a_small_card_with_several_changes(tmp_path: Path) -> None:
    run = wanted(save_size(tmp_path, "8b"), length=2048, micro_batch=2, device="cuda", numbers="bf16")
    offer = fit.offer(memory.forecast(run), 9 * 2**30)
    assert len(offer.fittings) == 3
    for way in offer.fittings:
        assert "quantize=nf4" in way.settings
        assert way.forecast.needed <= 9 * 2**30
