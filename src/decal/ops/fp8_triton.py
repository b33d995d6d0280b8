"""Rows in 8-bit floats on a CUDA card: ops/fp8.py's result bit for bit, each row read once."""

# Triton compiles kernels from their source and gives their arguments its own types; functions for Python are typed.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from decal.ops.nf4_triton import on


def rows(x: Tensor, largest: float, smallest: float) -> tuple[Tensor, Tensor]:
    """Return x (M, K) in e4m3 and the scale of each row (M, 1), whose largest number becomes `largest`.

    A row without a number over `smallest` counts as if it had one.
    """
    count, width = x.shape
    out = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(width)
    with on(x.device):
        _rows[(count,)](
            x, out, scale, x.stride(0), width,
            SIZE=size, LARGEST=largest, SMALLEST=smallest, num_warps=min(16, max(4, size // 1024)),
        )  # fmt: skip
    return out, scale


@triton.jit
def _rows(x, out, scale, stride, width, SIZE: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    top = tl.reduce(tl.abs(value), 0, _larger)
    top = tl.where(top < SMALLEST, SMALLEST, top)
    step = tl.div_rn(top, LARGEST)
    tl.store(scale + row, step)
    value = tl.div_rn(value, step)
    value = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
    tl.store(out + row * width + column, value.to(tl.float8e4nv), mask=inside)


@triton.jit
def _larger(a, b):
    """Return the larger, NaN if one is: what is not a number must not be lost."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
