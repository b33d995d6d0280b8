"""Gradients on a CUDA card in every mode, against fp32 without any of decal's shortcuts. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from decal.data.batch import Batch
from decal.layers.coded import CodedBase
from decal.model.inject import place
from decal.model.lean import lean
from decal.ops import fuse, slabs
from decal.ops.block import Memory
from decal.spec import TrainConfig
from decal.training import graphs, head, optim, precision
from decal.training.losses import SFT
from decal.training.step import take_step
from tests.layers import four_layers

pytestmark = pytest.mark.gpu

MODES: tuple[Memory, ...] = ("keep", "recompute", "offload")


def batch(rows: int = 2, length: int = 1024, *, packed: bool = False) -> Batch:
    ids = torch.randint(0, 2048, (rows, length), generator=torch.Generator().manual_seed(1))
    lengths = (length // 3, length // 5, length - length // 3 - length // 5)
    places = torch.cat([torch.arange(n) for n in lengths]).expand(rows, length)
    return Batch(input_ids=ids, labels=ids, position_ids=places if packed else None)


SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def made(quantize: str | None, of_head: str = "wide") -> nn.Module:
    """Return the model on the card."""
    return four_layers.make(SIZES, quantize, rank=16, device="cuda", of_head=of_head)


def gradients(model: nn.Module, *, autocast: bool, packed: bool = False) -> dict[str, Tensor]:
    for _ in range(2):  # from the second pass on packed rows run directly
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss, count = SFT(chunked=True)(model, batch(packed=packed))
        (loss / count).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of the whole gradient."""
    assert got.keys() == expected.keys()
    error = sum(float((got[n].double() - e.double()).square().sum()) for n, e in expected.items())
    return (error / sum(float(e.double().square().sum()) for e in expected.values())) ** 0.5


@contextmanager
def mode(model: nn.Module, memory: Memory, *, fp8: bool = False) -> Iterator[None]:
    if memory != "keep":
        model.activation_checkpointing_enable(offload=memory == "offload")
    with lean(model, fp8=fp8):
        yield


@contextmanager
def exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with fuse.forced("off"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def errors(quantize: str | None, *, packed: bool) -> dict[str, float]:
    """The relative error of the general path in bf16 and of each mode."""
    model = made(quantize)
    with fuse.forced("off"):
        found = {"general": gradients(model, autocast=True, packed=packed)}
    for memory in MODES:
        model = made(quantize)
        with mode(model, memory):
            found[memory] = gradients(model, autocast=True, packed=packed)
    with fuse.forced("plain"):
        model = made(quantize)
        with mode(model, "keep"):
            found["plain"] = gradients(model, autocast=True, packed=packed)
    with exact():
        expected = gradients(four_layers.widened(made(quantize)), autocast=False, packed=packed)
        for memory in MODES:
            model = made(quantize).float()
            with fuse.forced("compiled"), mode(model, memory):
                found[f"{memory} fp32"] = gradients(model, autocast=False, packed=packed)
    return {name: distance(got, expected) for name, got in found.items()}


def twenty(
    quantize: str | None,
    memory: Memory,
    before: int,
    groups: list[list[Batch]],
    *,
    attention: SDPBackend | None,
    of_head: str = "wide",
) -> tuple[list[float], list[Tensor], int]:
    """The losses of 20 steps over `groups` in turn, the adapter after them, and how many shapes were recorded."""
    model = made(quantize, of_head)
    numbers = precision.resolve("bf16", torch.device("cuda"))
    optimizer = optim.build(model, TrainConfig(lr=1e-3))
    said: list[str] = []
    ran = graphs.Graphs(numbers, said.append, before=before)
    loss = SFT(chunked=True)
    losses = []
    with mode(model, memory), nullcontext() if attention is None else sdpa_kernel(attention):
        for step in range(20):
            result = take_step(
                model,
                groups[step % len(groups)],
                loss,
                optimizer,
                numbers.scaler(),
                precision=numbers,
                limit=1.0,
                run=ran.backward,
            )
            losses.append(result.loss)
    assert said == []
    return losses, [p.detach().clone() for p in model.parameters() if p.requires_grad], len(ran._recorded)


@pytest.mark.parametrize("memory", MODES)
def test_replayed_steps_are_the_launched_ones(memory: Memory) -> None:
    # The last rows are so many that queries, keys and values are merged in one larger buffer.
    groups = [[batch(2, 256), batch(2, 100)], [batch(2, 250), batch(1, 256)], [batch(1, 1100)]]
    math = SDPBackend.MATH  # the quick ones sum in no fixed order
    # Regions are compiled for one shape, then for any: from the second time on they stay the same.
    twenty("nf4", memory, 10**6, groups, attention=math)
    launched, expected, none = twenty("nf4", memory, 10**6, groups, attention=math)
    replayed, got, recorded = twenty("nf4", memory, 2, groups, attention=math)
    assert (none, recorded) == (0, 4)
    assert replayed == launched
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert launched[-1] < launched[0]


def test_replayed_packed_steps_are_about_the_launched_ones() -> None:
    groups = [[batch(2, 256, packed=True)], [batch(2, 1000, packed=True)]]
    launched, _, none = twenty("nf4", "keep", 10**6, groups, attention=None)
    replayed, _, recorded = twenty("nf4", "keep", 2, groups, attention=None)
    assert (none, recorded) == (0, 2)
    # FlashAttention's backward pass sums in no fixed order: 2^-9 of each gradient, in 20 steps that lower the loss.
    assert replayed == pytest.approx(launched, rel=2e-3)


@pytest.mark.parametrize("of_head", ["nf4", "int8"])
def test_a_head_in_codes_is_replayed_and_has_the_gradient_of_the_decoded_one(
    of_head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "ROWS", 600)  # of 2048 words
    groups = [[batch(2, 256)]]
    twenty("nf4", "keep", 10**6, groups, attention=SDPBackend.MATH, of_head=of_head)
    launched, expected, _ = twenty("nf4", "keep", 10**6, groups, attention=SDPBackend.MATH, of_head=of_head)
    replayed, got, one = twenty("nf4", "keep", 2, groups, attention=SDPBackend.MATH, of_head=of_head)
    assert one == 1
    assert replayed == launched
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert launched[-1] < launched[0]
    with exact():
        coded, dense = (made("nf4", of_head).float() for _ in range(2))
        layer: Any = head.parts(dense)[1]
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(CodedBase(layer).dense(torch.float32), requires_grad=False)
        place(dense, "base_model.model.lm_head", plain)
        error = distance(*(gradients(model, autocast=False) for model in (coded, dense)))
    assert error < 1e-5  # fp32: the same sums, by slabs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_mode_gives_the_gradient(quantize: str | None, packed: bool) -> None:
    found = errors(quantize, packed=packed)
    assert max(found[m] for m in MODES) < 1.1 * found["general"], found  # no worse than layer by layer
    assert max(found[f"{m} fp32"] for m in MODES) < 1e-4, found  # the same sums in another order


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_fp8_gives_a_gradient_of_about_the_same_direction(quantize: str | None, memory: Memory) -> None:
    if torch.cuda.get_device_capability() < precision.FP8_FROM:
        pytest.skip("this card has no products in 8-bit floats")
    model = made(quantize)
    with mode(model, memory, fp8=True):
        got = gradients(model, autocast=True)
    with exact():
        expected = gradients(four_layers.widened(made(quantize)), autocast=False)
    both = [torch.cat([found[n].flatten().double() for n in sorted(found)]) for found in (got, expected)]
    assert float(torch.cosine_similarity(both[0], both[1], 0)) >= 0.99  # aimed for; 0.9955 on a CPU
