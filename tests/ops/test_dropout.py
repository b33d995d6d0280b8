"""Dropout whose mask is a seed: its statistics, its kernels, and what a projection of a dropped input keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal import LoraConfig, get_peft_model
from decal.model.lean import lean
from decal.ops import dropout, fuse, remake, select
from decal.ops.dropout import Drop
from decal.planning import traced
from tests import models

N = 1 << 20


def kept(drop: Drop, *shape: int) -> Tensor:
    """Return 1.0 where a number is kept."""
    return (drop(torch.ones(*shape)) != 0).double()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_that_is_dropped_and_the_mean(p: float) -> None:
    drop = Drop(p, 12345)
    error = 5 * (p * (1 - p) / N) ** 0.5  # five standard errors of a share of N independent draws
    assert abs(float(kept(drop, N).mean()) - (1 - p)) < error
    assert float(drop(torch.ones(N)).max()) == pytest.approx(1 / (1 - p))


def test_neighbours_and_other_seeds_are_independent() -> None:
    seeds = [7, 8, 7 << 32, (1 << 64) - 1]
    masks = torch.stack([kept(Drop(0.5, seed), N) for seed in seeds])
    shifted = [masks[0].roll(n) for n in (1, 2, 64, 1024, 4096)]
    found = torch.corrcoef(torch.stack([*masks, *shifted])) - torch.eye(len(masks) + len(shifted))
    assert float(found.abs().max()) < 5 / N**0.5  # five standard errors of a correlation of N pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_loop_gives_the_bits_of_the_reference(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = torch.randn(500, 300, dtype=dtype, generator=torch.Generator().manual_seed(0))
    try:
        for view in (x, x[:, :7], x.T, x[:0]):
            for seed in (0, 1, 0x9E3779B97F4A7C15):
                with select.forced("reference"):
                    expected = Drop(0.3, seed)(view)
                with select.forced("numba"):
                    got = Drop(0.3, seed)(view)
                assert torch.equal(got, expected)
                assert got.is_contiguous()
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_torchs_compiler_gives_the_bits_of_the_reference() -> None:
    x = torch.randn(64, 48, dtype=torch.bfloat16)
    with select.forced("reference"):
        for seed in (0, 1 << 31, 1 << 63, (1 << 64) - 1):
            with fuse.forced("compiled"):
                got = Drop(0.1, seed)(x)
            assert torch.equal(got, Drop(0.1, seed)(x))


def test_a_nan_is_not_hidden() -> None:
    x = torch.full((1000,), float("nan"))
    for choice in ("reference", "numba"):
        with select.forced(choice):  # type: ignore[arg-type]  # one of its words
            assert Drop(0.5, 3)(x).isnan().all()


def test_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(3)
    first = [dropout.drawn(0.1, torch.device("cpu")) for _ in range(3)]
    torch.manual_seed(3)
    assert [dropout.drawn(0.1, torch.device("cpu")) for _ in range(3)] == first
    assert len({drop.seed for drop in first}) == 3


class Twice:
    """An operation whose result is made again."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def backward(self, dy: Tensor, x: Tensor) -> tuple[Tensor]:
        return (2 * dy,)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_change_of_a_dropped_input_and_its_gradients_follow_the_formula(made: bool, whole: bool) -> None:
    drop, s = Drop(0.4, 99), 1.7
    x, A, B, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5, 24), (4, 24), (10, 4), (10,)))
    W, dy = torch.randn(10, 24, dtype=torch.float64), torch.randn(3, 5, 10, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, A, B, bias))

    def source() -> Tensor:
        return remake.made(Twice(), x) if made else 2 * x

    mask = drop(torch.ones(3, 5, 24, dtype=torch.float64))
    expected = s * (2 * x * mask) @ A.T @ B.T + bias
    if whole:
        expected = expected + 2 * x @ W.T
    got = dropout.beside(source(), A, B, s, drop, weight=(lambda dtype: W.to(dtype)) if whole else None, bias=bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # fp64
    wanted = torch.autograd.grad(expected, inputs, dy)
    for gradient, one in zip(torch.autograd.grad(got, inputs, dy), wanted, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-12, atol=1e-12)


def adapted(**settings: Any) -> nn.Module:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(models.make("llama", torch.float32), config, generator=torch.Generator().manual_seed(1))


IDS = models.tokens(4, 32)


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return the loss, the gradients, and the bytes that the pass keeps besides parameters."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return (
        loss.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        sum(storages.values()),
    )


def test_a_training_pass_keeps_no_more_with_dropout_than_without() -> None:
    with lean(without := adapted().train()):
        *_, plain = run(without)
    with lean(model := adapted(lora_dropout=0.3).train()):
        *_, redrawn = run(model)
    *_, kept = run(model)  # as torch does it: a mask and a dropped copy for each of seven layers
    assert redrawn <= plain
    assert kept > redrawn + IDS.numel() * 2 * 32 * 4 * 5


def test_a_change_is_no_tensor_of_its_own() -> None:
    (rows, inputs, outputs), trace = (500, 32, 300), traced.Trace()
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.3)
    with lean(model := get_peft_model(nn.Sequential(nn.Linear(inputs, outputs)), config).train()), trace:
        y = model(torch.randn(rows, inputs))
    assert y.requires_grad
    assert len([block for block in trace.blocks if block.bytes >= rows * outputs * 4]) == 1


def test_layers_that_are_computed_again_draw_the_same() -> None:
    with lean(model := adapted(lora_dropout=0.3).train()):
        loss, expected, _ = run(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        again, got, _ = run(model)
        other = run(model)[0]
    assert torch.equal(again, loss)
    assert torch.equal(other, loss)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_outside_of_training_torch_draws_as_before() -> None:
    model = adapted(lora_dropout=0.3).train()
    before, *_ = run(model)
    with lean(model):
        inside, *_ = run(model)
    after, *_ = run(model)
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)


def test_without_numba_a_cpu_keeps_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "installed", lambda library: library != "numba")
    model = adapted(lora_dropout=0.3).train()
    before, *_ = run(model)
    with lean(model):
        inside, *_ = run(model)
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=0)  # the same masks; fp32 in another order


@pytest.mark.gpu
def test_on_a_card_it_drops_what_it_drops_here() -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for number in range(12):  # more seeds than torch.compile would compile for one by one
        dropped = Drop(0.1, (number * 0x9E3779B97F4A7C15) % (1 << 64))
        assert torch.equal(dropped(x.cuda()).cpu(), dropped(x))
