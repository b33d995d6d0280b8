"""x Wᵀ for a few rows from 4-bit codes, as Triton kernels: W is held only in registers.

For one row level · x is summed in fp32 and each block's sum is scaled, so W is not rounded at all; for 2 to 32 rows W
is rounded to the dtype of x as a decode would round it, and summed on the tensor cores.

Shapes: W (out, in), x (rows, in).
"""

# Triton compiles kernels from their source and gives their arguments its own types; functions for Python are typed.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decal.ops import nf4
from decal.ops.nf4_triton import PRECISIONS, as_words, on, scale_arguments, scale_of, values8, weights, words

ROWS = 32


class Tiles(NamedTuple):
    """What a program computes: `out` outputs, `inputs` at a time, one of up to `parts` sums; and how it is compiled."""

    out: int
    inputs: int
    parts: int
    warps: int
    stages: int


# The quickest of 646 on an H200, for 14336 x 4096 and 4096 x 14336 together.
ONE = Tiles(out=8, inputs=2048, parts=1, warps=4, stages=3)
FEW = {  # by the rows that there is room for
    16: Tiles(out=64, inputs=128, parts=8, warps=4, stages=3),
    32: Tiles(out=64, inputs=128, parts=4, warps=4, stages=3),
}


def can_multiply(x: Tensor, block: int) -> bool:
    """Return whether `multiply` takes x: (1..32, in), fp32, fp16 or bf16, `in` in whole blocks."""
    return x.dim() == 2 and 1 <= len(x) <= ROWS and x.dtype in PRECISIONS and x.shape[1] % block == 0


def multiply(x: Tensor, packed: Tensor, scales: nf4.Scales, out_features: int, block: int, kind: str) -> Tensor:
    """Return x Wᵀ (rows, out) in the dtype of x, summed in fp32 in a fixed order."""
    rows, inputs = x.shape
    outputs = out_features
    x = x.contiguous()
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    shared = (as_words(packed), *scale_arguments(scales), nf4.levels(kind, x.device), x)
    nested = isinstance(scales, nf4.Nested)
    with on(x.device):
        if rows == 1:
            _multiply_one[(-(-outputs // ONE.out),)](
                *shared, y, inputs, outputs,
                OUT=ONE.out, IN=ONE.inputs, BLOCK=block, NESTED=nested,
                WHOLE=outputs % ONE.out == 0 and inputs % ONE.inputs == 0,
                num_warps=ONE.warps, num_stages=ONE.stages,
            )  # fmt: skip
            return y
        room = 16 if rows <= 16 else 32
        few = FEW[room]
        parts = max(1, min(few.parts, inputs // (4 * few.inputs)))
        part = few.inputs * -(-inputs // (few.inputs * parts))
        parts = -(-inputs // part)
        sums = y if parts == 1 else torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
        _multiply_few[(-(-outputs // few.out), parts)](
            *shared, sums, rows, inputs, outputs, part,
            OUT=few.out, IN=few.inputs, ROWS=room, BLOCK=block, NESTED=nested,
            WHOLE=outputs % few.out == 0 and inputs % few.inputs == 0, PRECISION="ieee",
            num_warps=few.warps, num_stages=few.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if parts > 1:
            _sum_parts[(-(-y.numel() // 1024),)](sums, y, y.numel(), PARTS=parts, SIZE=1024, num_warps=4)
    return y


@triton.jit
def _multiply_one(
    packed, absmax, codes, outer, offset, table, levels, x, y, inputs, outputs,
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = BLOCK if BLOCK < IN else IN
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    b = tl.arange(0, IN // SPAN) * SPAN
    at = packed + row.to(tl.int64)[:, None] * tl.multiple_of(inputs // 8, 4) + tl.arange(0, IN // 8)[None, :]
    i = row.to(tl.int64)[:, None] * (inputs // BLOCK)
    word = words(at, row, 0, inputs, outputs, IN, WHOLE)
    total = tl.zeros([OUT, IN // SPAN], tl.float32)
    for k in range(0, inputs, IN):
        at += IN // 8
        ahead = words(at, row, k + IN, inputs, outputs, IN, WHOLE)  # on its way while we sum
        column = k + b[None, :]
        live = (row < outputs)[:, None] & (column < inputs)
        scale = scale_of(absmax, codes, outer, offset, table, i + column // BLOCK, live, NESTED)
        factor = tl.load(x + k + tl.arange(0, IN), mask=k + tl.arange(0, IN) < inputs, other=0.0).to(tl.float32)
        value = values8(word, levels).reshape(OUT, IN // SPAN, SPAN)
        total += tl.sum(value * factor.reshape(IN // SPAN, SPAN)[None, :, :], 2) * scale
        word = ahead
    tl.store(y + row, tl.sum(total, 1).to(y.dtype.element_ty), mask=row < outputs)


@triton.jit
def _multiply_few(
    packed, absmax, codes, outer, offset, table, levels, x, y, rows, inputs, outputs, part,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    start = tl.program_id(1) * part
    r = tl.arange(0, ROWS)
    total = tl.zeros([OUT, ROWS], tl.float32)
    for k in range(start, tl.minimum(start + part, inputs), IN):
        column = k + tl.arange(0, IN)
        value, scale = weights(
            packed, absmax, codes, outer, offset, table, levels, row, k, inputs, outputs,
            OUT, IN, BLOCK, NESTED, WHOLE,
        )  # fmt: skip
        factor = tl.load(
            x + r[None, :] * inputs + column[:, None], mask=(r < rows)[None, :] & (column < inputs)[:, None], other=0.0
        )
        weight = (value * scale[:, :, None]).reshape(OUT, IN).to(x.dtype.element_ty)
        total = tl.dot(weight, factor, total, input_precision=PRECISION)
    at = y + (tl.program_id(1) * rows + r[None, :]) * outputs + row[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=(r < rows)[None, :] & (row < outputs)[:, None])


@triton.jit
def _sum_parts(parts, y, n, PARTS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(parts + i, mask=i < n, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * n + i, mask=i < n, other=0.0)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < n)
