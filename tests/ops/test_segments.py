"""Attention within packed samples against attention of each sample alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from decal.ops import segments as ops
from decal.ops.segments import EVERY, SHORTEST, attend, segments

HEADS, KV, WIDTH = 4, 2, 16
SCALE = 0.25


def positions(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def test_bounds_are_where_samples_begin() -> None:
    found = segments(positions([3, 5], [8], [1, 1, 6]))
    assert found.bounds[:7].tolist() == [0, 3, 8, 16, 17, 18, 24]
    assert found.bounds[6:].unique().tolist() == [24]  # filled up with samples of no token
    assert len(found.bounds) == EVERY
    assert found.bounds.dtype == torch.int32  # what the kernels take
    assert (found.longest, found.reach) == (8, SHORTEST)


@pytest.mark.parametrize(("longest", "bucket"), [(1, 128), (128, 128), (129, 256), (2048, 2048), (2049, 4096)])
def test_the_longest_sample_is_rounded_up(longest: int, bucket: int) -> None:
    assert segments(positions([longest, 1])).reach == bucket


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, 12, WIDTH), (2, KV, 12, WIDTH), (2, KV, 12, WIDTH)]
    q, k, v = (torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def alone(q: Tensor, k: Tensor, v: Tensor, rows: tuple[list[int], ...]) -> Tensor:
    """Each sample by itself."""
    out = []
    for row, lengths in enumerate(rows):
        parts = [x[row].split(lengths, 1) for x in (q, k, v)]
        pieces = [
            scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=SCALE, enable_gqa=True)[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        out.append(torch.cat(pieces, 1))
    return torch.stack(out).transpose(1, 2)


def test_no_sample_sees_another() -> None:
    rows = ([5, 1, 6], [12])
    expected_in, got_in = inputs(), inputs()
    expected = alone(*expected_in, rows)
    q, k, v = got_in
    got = attend(q, k, v, segments(positions(*rows)), SCALE)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in zip(got_in, expected_in, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", [2, 8])
def test_on_a_card_flash_attention_is_the_masked_one(kv: int) -> None:
    make = torch.Generator().manual_seed(0)
    rows = ([300, 1, 723], [1024])
    where = segments(positions(*rows)).to(torch.device("cuda"))
    shapes = [(2, heads, 1024, 64) for heads in (8, kv, kv)]
    q, k, v = (torch.randn(shape, generator=make).to("cuda", torch.bfloat16) for shape in shapes)
    assert ops._takes(q)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    narrow = [x.requires_grad_() for x in (q, k, v)]
    got, expected = (attend(x[0], x[1], x[2], where, SCALE) for x in (narrow, wide))
    weight = torch.randn(got.shape, generator=make).cuda()
    (got.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [(got, expected), *((a.grad, b.grad) for a, b in zip(narrow, wide, strict=True))]
    for mine, theirs in pairs:
        assert mine is not None
        assert theirs is not None
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert float(error.detach()) < 2**-7  # results and probabilities are rounded to 8 bits
