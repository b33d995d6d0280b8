"""The count of operations: equal on tensors without values, where little of an operation runs, and on real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from decal.ops import fuse
from decal.planning.traced import Trace

INDEX = torch.zeros(64, 1, dtype=torch.long)  # has values, as labels and positions have


def written_over(x: Tensor) -> Tensor:
    """Return something of x (64, 64) in operations that write over tensors or mix those with and without values."""
    y = torch.mul(x, 2, out=torch.empty_like(x)).add_(x)
    y[INDEX[0]] += x.gather(1, INDEX).flatten()
    z = torch.nn.functional.silu(y[:32]).scatter_add_(1, INDEX[:32], y.new_ones(32, 1))
    return torch.mm(y, z.t_(), out=y.new_empty(0))  # t_ changes z's form, and an empty tensor takes what it needs


def count(x: Tensor) -> tuple[Any, ...]:
    """Return the result's form, and what was made and done, in order."""
    with Trace() as trace:
        out = written_over(x)
    blocks = [(block.bytes, block.died is None) for block in trace.blocks]
    work = [[amount for _, amount in done] for done in (trace.flops, trace.moved)]
    return out.shape, out.stride(), blocks, work


def test_operations_that_write_over_are_counted_as_on_real_tensors() -> None:
    expected = count(torch.randn(64, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert count(torch.empty(64, 64)) == expected


def test_a_region_runs_once_for_inputs_of_one_kind() -> None:
    calls: list[torch.Size] = []

    @fuse.region
    def halves(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        calls.append(x.shape)
        return x[:1] * factor, (x[1:] * factor).t().contiguous()

    trace = Trace()
    with FakeTensorMode(), fuse.forced("plain"), fuse.seen_by(trace), trace:
        made = [halves(torch.empty(*shape), 2.0) for shape in ((2, 8), (2, 8), (2, 4), (2, 8))]
    assert calls == [(2, 8), (2, 4)]
    for again in (made[1], made[3]):
        assert [(x.shape, x.stride(), x.dtype) for x in again] == [(x.shape, x.stride(), x.dtype) for x in made[0]]
    assert len({x.untyped_storage()._cdata for pair in made for x in pair}) == 8


def test_a_region_whose_result_lies_in_its_input_runs_each_time() -> None:
    @fuse.region
    def rows(x: Tensor) -> Tensor:
        return x[1:]

    trace = Trace()
    with FakeTensorMode(), fuse.forced("plain"), fuse.seen_by(trace), trace:
        x = torch.empty(4, 8)
        first, second = rows(x), rows(x)
    assert first.untyped_storage()._cdata == second.untyped_storage()._cdata == x.untyped_storage()._cdata
