"""AdamW8bit's states side by side: the same bits as each tensor for itself, in few operations and no more memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from decal.ops import adam8
from decal.ops.adam8 import BLOCK, Moments
from decal.planning.traced import Trace, peak
from decal.training import adamw8bit
from decal.training.adamw8bit import SLOTS, AdamW8bit

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(128, 64), (100, 77), (4096,), (64, 65), (16, 256), (9000,)]  # 32, 31, 16, 17, 16 and 36 blocks
STEPS = 8


def parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]


def gradient(step: int, number: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + number)) / 100


def has_gradient(step: int, number: int) -> bool:
    """The last two begin at step 2; at steps 3 and 4 every third has none; from step 5 on all have one."""
    late, skipped = number >= 4 and step < 2, step in (3, 4) and number % 3 == 0
    return not late and not skipped


def filled(x: Tensor) -> Tensor:
    return F.pad(x.flatten(), (0, -x.numel() % BLOCK))


def alone(number: int, shape: tuple[int, ...]) -> tuple[Tensor, Moments]:
    """Return a parameter and its moments after STEPS steps by the formula, with no other tensor near it."""
    p = filled(parameters()[number].detach())
    codes, absmax = torch.zeros(2, len(p), dtype=torch.uint8), torch.zeros(2, len(p) // BLOCK)
    moments, count = Moments(codes[0], absmax[0], codes[1], absmax[1]), 0
    for step in range(STEPS):
        if has_gradient(step, number):
            count += 1
            p, moments = adam8.adamw(p, filled(gradient(step, number, shape)), moments, step=count, **SETTINGS)
    return p[: math.prod(shape)].view(shape), moments


def give(weights: list[nn.Parameter], step: int) -> None:
    for number, p in enumerate(weights):
        p.grad = gradient(step, number, tuple(p.shape)) if has_gradient(step, number) else None


def untouched(optimizer: AdamW8bit) -> AdamW8bit:
    return optimizer


def resumed(optimizer: AdamW8bit) -> AdamW8bit:
    other = AdamW8bit(optimizer.param_groups[0]["params"], **SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    return other


def moved_away_and_back(optimizer: AdamW8bit) -> AdamW8bit:
    """As training/paged.py does, but only to some of the tensors."""
    for p in optimizer.param_groups[0]["params"][1:4]:
        optimizer.state[p] |= {slot: x.clone() for slot, x in optimizer.state[p].items()}
    return optimizer


def given_other_memory(optimizer: AdamW8bit) -> AdamW8bit:
    for state in list(optimizer.state.values())[::2]:
        for value in state.values():
            value.data = value.data.clone()
    return optimizer


@pytest.mark.parametrize("run", [7, 50, 1 << 14])  # blocks: all are cut; some go together; all go together
@pytest.mark.parametrize("between", [untouched, resumed, moved_away_and_back, given_other_memory])
def test_each_tensor_moves_as_if_alone_bit_for_bit(
    between: Callable[[AdamW8bit], AdamW8bit], run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw8bit, "RUN", run)
    weights = parameters()
    optimizer = AdamW8bit(weights, **SETTINGS)
    for step in range(STEPS):
        give(weights, step)
        optimizer.step()
        if step in (1, 4):
            optimizer = between(optimizer)
    for number, (p, shape) in enumerate(zip(weights, SHAPES, strict=True)):
        expected, moments = alone(number, shape)
        assert torch.equal(p, expected)
        for slot, value in zip(SLOTS, moments, strict=True):
            assert torch.equal(optimizer.state[p][slot].flatten(), value)


def held(optimizer: AdamW8bit) -> tuple[int, int]:
    """Return the bytes of the states, and of the storages that they keep alive."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in values}
    return sum(x.nbytes for x in values), sum(storages.values())


@pytest.mark.parametrize("between", [untouched, resumed])
def test_no_storage_outlives_its_states(between: Callable[[AdamW8bit], AdamW8bit]) -> None:
    weights = parameters()
    optimizer = AdamW8bit(weights, **SETTINGS)
    for step in range(STEPS):
        give(weights, step)
        optimizer.step()
        needed, kept = held(optimizer)
        assert kept == needed
        if step in (1, 4):
            optimizer = between(optimizer)


class Counted(TorchDispatchMode):
    """Count the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(tensors: int, shape: tuple[int, ...], *, load: bool = False) -> int:
    """Return the operations of a third step, after loading and a step more if `load`."""
    weights = parameters([shape] * tensors)
    optimizer = AdamW8bit(weights, **SETTINGS)
    for step in range(2):
        give(weights, 9 + step)
        optimizer.step()
    if load:
        optimizer = resumed(optimizer)
        optimizer.step()
    with Counted() as counted:
        optimizer.step()
    return counted.operations


@pytest.mark.parametrize(
    ("shape", "each"),
    [
        ((16, 256), 2),  # a flat view of the weight, and of its gradient
        ((64, 65), 5),  # with a short last block: zeros behind both, and what is beyond the weight's end left out
    ],
)
@pytest.mark.parametrize("load", [False, True])
def test_a_tensor_more_costs_a_few_operations(shape: tuple[int, ...], each: int, load: bool) -> None:
    few, many = operations(10, shape, load=load), operations(40, shape, load=load)
    assert many - few == 30 * each
    assert few - 10 * each < 100  # one run: its arithmetic, and a few to gather and to write


TOGETHER, LARGE, FILLED_UP = [(16, 256), (32, 256)] * 8, [(200, 256), (16, 256)], [(100, 77)] * 3


@pytest.mark.parametrize("shapes", [TOGETHER, LARGE, FILLED_UP])
@pytest.mark.parametrize("between", [untouched, resumed])
def test_a_step_takes_for_itself_what_a_plan_counts(
    shapes: list[tuple[int, ...]], between: Callable[[AdamW8bit], AdamW8bit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw8bit, "RUN", 64)
    weights = parameters(shapes)
    optimizer = AdamW8bit(weights, **SETTINGS)
    give(weights, 9)
    optimizer.step()
    optimizer = between(optimizer)
    with Trace() as trace:
        for p in weights:
            for value in (p, p.grad, *optimizer.state[p].values()):
                assert value is not None
                trace.see(value)
        before, began = sum(block.bytes for block in trace.blocks), trace.now
        optimizer.step()
    most, counted = peak(trace.blocks, began, trace.now)[0] - before, adamw8bit.step_bytes(weights)
    # Beyond that: a block's absmax and its inverse, 12 bytes for 256 elements, and masks as short as a step's counts.
    assert most == pytest.approx(counted, rel=0.005)
    assert most < 35 * 64 * BLOCK  # of one run, of which there are up to six
