"""One optimizer step: what is averaged, clipped and refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decal.data import pack
from decal.data.batch import IGNORE, Batch
from decal.data.mask import Sample
from decal.errors import DataError, RunError
from decal.spec import TrainConfig
from decal.training import optim
from decal.training.losses import SFT
from decal.training.precision import Precision, resolve
from decal.training.step import StepResult, backward, take_step
from tests import models

CPU = torch.device("cpu")
FP32 = Precision(name="fp32", device=CPU)


def samples() -> list[Sample]:
    """Return four samples of very different lengths and shares in the loss: a mean of means would be wrong."""
    made = []
    for seed, (length, learnt) in enumerate([(4, 1), (30, 29), (12, 3), (20, 8)]):
        ids = models.tokens(1, length, seed)[0].tolist()
        made.append(Sample(ids=ids, labels=[IGNORE] * (length - learnt) + ids[length - learnt :]))
    return made


def split(sizes: Sequence[int]) -> list[Batch]:
    rest, batches = samples(), []
    for size in sizes:
        batches.append(pack.collate([[s] for s in rest[:size]], pad_id=0))
        rest = rest[size:]
    return batches


def gradients(sizes: Sequence[int], *, chunked: bool = True) -> tuple[Tensor, list[Tensor]]:
    model = models.make("llama", torch.float32)
    mean = backward(model, split(sizes), SFT(chunked=chunked), FP32.scaler(), precision=FP32)
    return mean, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(sizes: tuple[int, ...], chunked: bool) -> None:
    mean, whole = gradients((4,))
    other, parts = gradients(sizes, chunked=chunked)
    torch.testing.assert_close(other, mean, rtol=1e-6, atol=0)
    assert len(parts) == len(whole) > 10
    scale = max(float(g.abs().max()) for g in whole)
    for mine, theirs in zip(parts, whole, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-6 * scale


def test_the_mean_is_over_all_loss_tokens() -> None:
    mean, _ = gradients((1, 3))
    model = models.make("llama", torch.float32)
    losses = []
    for s in samples():
        logits = model(torch.tensor([s.ids])).logits[0]
        losses.append(F.cross_entropy(logits[:-1], torch.tensor(s.labels[1:]), reduction="none"))
    every = torch.cat([x[x != 0] for x in losses])  # ignored positions have loss 0 exactly
    assert len(every) == 1 + 29 + 3 + 8
    torch.testing.assert_close(mean, every.mean().detach(), rtol=1e-5, atol=0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], limit: float = 1.0) -> StepResult:
    return take_step(model, batches, SFT(chunked=True), optimizer, FP32.scaler(), precision=FP32, limit=limit)


def test_a_step_equals_torchs_own_clipping_and_adamw() -> None:
    ours, theirs = models.twins("llama", torch.float32)
    config = TrainConfig(lr=1e-2, max_grad_norm=0.05)
    optimizer = optim.build(ours, config)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, betas=config.betas, fused=False)
    for _ in range(3):
        result = step(ours, optimizer, split((2, 2)), limit=config.max_grad_norm)
        backward(theirs, split((4,)), SFT(chunked=True), FP32.scaler(), precision=FP32)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
        other.step()
        other.zero_grad()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert result.grad_norm > 1  # clipped, and reported as it was before
    assert (result.count, result.tokens, result.skipped) == (41, 2 * 30 + 2 * 20, False)
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(bad: float) -> None:
    model = models.make("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight[3] = bad
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RunError, match="the loss is not finite"):
        step(model, optim.build(model, TrainConfig(lr=1.0)), split((4,)))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    model = models.make("llama", torch.float32)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = model.model.norm.weight.clone()
    with pytest.raises(RunError, match="the gradient norm is not finite"):
        step(model, optim.build(model, TrainConfig(lr=1.0)), split((4,)))
    assert torch.equal(model.model.norm.weight, before)


def empty(batch: Batch) -> Batch:
    labels = torch.full_like(batch.labels, IGNORE)
    return Batch(input_ids=batch.input_ids, labels=labels, position_ids=None)


def test_a_step_without_loss_tokens_is_refused_but_a_micro_batch_may_have_none() -> None:
    model = models.make("llama", torch.float32)
    (whole,) = split((4,))
    optimizer = optim.build(model, TrainConfig(lr=1e-3))
    with pytest.raises(DataError, match="a whole step holds no token to learn"):
        step(model, optimizer, [empty(whole)])
    alone = step(model, optim.build(model, TrainConfig(lr=1e-9)), [whole])
    beside = step(model, optim.build(model, TrainConfig(lr=1e-9)), [empty(whole), whole])
    assert beside.loss == pytest.approx(alone.loss, rel=1e-6)
    assert beside.count == alone.count


def test_bf16_autocast_trains_fp32_weights() -> None:
    model = models.make("llama", torch.float32)
    precision = Precision(name="bf16", device=CPU)
    optimizer = optim.build(model, TrainConfig(lr=1e-3))
    exact = gradients((4,))[0]
    result = take_step(
        model, split((4,)), SFT(chunked=True), optimizer, precision.scaler(), precision=precision, limit=1.0
    )
    assert result.loss == pytest.approx(float(exact), rel=1e-2)  # bf16 keeps 8 bits
    assert result.loss != pytest.approx(float(exact), rel=1e-7)  # and was used
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fp16_skips_an_overflowing_step_and_halves_its_scale() -> None:
    model = models.make("llama", torch.float32)
    precision = Precision(name="fp16", device=CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # beyond fp16's largest number, 65504
    optimizer = optim.build(model, TrainConfig(lr=1e-3))
    before = [p.clone() for p in model.parameters()]

    def again() -> StepResult:
        return take_step(model, split((4,)), SFT(chunked=True), optimizer, scaler, precision=precision, limit=1.0)

    assert again().skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**39
    scaler.update(256.0)
    result = again()
    assert not result.skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert result.loss == pytest.approx(float(gradients((4,))[0]), rel=1e-2)


def test_precision_is_fp32_on_a_cpu_unless_asked() -> None:
    assert resolve("auto", CPU).name == "fp32"
    assert resolve("bf16", CPU).name == "bf16"


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_step_that_is_not_finite_moves_nothing(by_itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card the optimizer itself leaves the step out, before the host knows; torch's CPU kernel does so, too."""
    monkeypatch.setattr("decal.training.step._skips_by_itself", lambda optimizer, scaler: by_itself)
    model = models.make("llama", torch.float32).train()
    optimizer = optim.build(model, TrainConfig(lr=1e-2, weight_decay=0.1))
    take_step(model, split((4,)), SFT(chunked=True), optimizer, FP32.scaler(), precision=FP32, limit=1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    steps = [float(state["step"]) for state in optimizer.state.values()]
    bias = nn.Parameter(torch.full((), math.inf))
    with pytest.raises(RunError, match="not finite"):
        take_step(
            model,
            split((4,)),
            Shifted(bias),
            optimizer,
            FP32.scaler(),
            precision=FP32,
            limit=1.0,
        )
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert [float(state["step"]) for state in optimizer.state.values()] == steps


class Shifted:
    """The usual loss times an infinite number."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def count(self, batch: Batch) -> int:
        return batch.loss_tokens

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        loss, count = SFT(chunked=True)(model, batch)
        return loss * self.factor, count
