"""Rows in 8-bit floats on a CUDA card: ops/fp8.py's result bit for bit."""

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
    size = min(triton.next_power_of_2(width), 4096 if width <= 16384 else 8192)  # benchmarks/rows_gpu.py: the quickest
    warps = max(4, size // 1024)
    with on(x.device):
        _rows[(count,)](
            x, out, scale, x.stride(0), width, SIZE=size, LARGEST=largest, SMALLEST=smallest, num_warps=warps
        )  # fmt: skip
    return out, scale


@triton.jit
def _rows(x, out, scale, stride, width, SIZE: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    top = tl.abs(value)
    for first in range(SIZE, width, SIZE):
        more = tl.load(x + row * stride + first + column, mask=first + column < width, other=0.0)
        top = _larger(top, tl.abs(more.to(tl.float32)))
    top = tl.reduce(top, 0, _larger)
    step = tl.div_rn(tl.where(top < SMALLEST, SMALLEST, top), LARGEST)
    tl.store(scale + row, step)
    by = tl.div_rn(1.0, step)
    tl.store(out + row * width + column, (value * by).to(tl.float8e4nv), mask=column < width)
    for first in range(SIZE, width, SIZE):  # again, from the cache
        more = tl.load(x + row * stride + first + column, mask=first + column < width, other=0.0)
        tl.store(
            out + row * width + first + column,
            (more.to(tl.float32) * by).to(tl.float8e4nv),
            mask=first + column < width,
        )


@triton.jit
def _larger(a, b):
    """Return the larger, NaN if one is: what is not a number must not be lost."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
