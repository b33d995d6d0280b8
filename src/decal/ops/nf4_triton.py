"""The 4-bit codec on a CUDA card, as Triton kernels: ops/nf4.py's results bit for bit, and W + s·B·A in one pass.

Every lane of a warp holds one of the 16 levels, and a level is fetched from the lane that its code names: one shuffle
for each weight, in which the hardware ignores the bits above the code. That needs a few lines of PTX; the interpreter,
which runs no PTX, looks levels up with tl.gather. Scales stored in 8 bits are decoded in the same launch. No product is
fused with a sum where bits must agree (enable_fp_fusion=False).

Shapes: n elements, m = ceil(n/block) scales, W (out, in), A (r, in), B (out, r).
"""

# Triton compiles kernels from their source and gives their arguments its own types; functions for Python are typed.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from decal.ops import dynamic8, nf4, rounding

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter runs no PTX
TILE = 4096  # elements a program encodes: the largest block
PRECISIONS = {
    torch.float32: "ieee",
    torch.float16: "tf32",
    torch.bfloat16: "tf32",
    torch.float8_e4m3fn: "tf32",
}  # B·A, by what it is rounded to next


def quantize(flat: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return packed codes (ceil(n/2),) uint8 and absmax (m,) fp32 of flat (n,); absmax shows a block's Inf or NaN."""
    n = len(flat)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=flat.device)
    with on(flat.device):
        _encode[(-(-n // TILE),)](
            flat, _bounds(kind, flat.device), _order(kind, flat.device), packed, absmax, n,
            TILE=TILE, BLOCK=block, TINY=nf4.TINY, ORDERED=kind != "nf4", num_warps=4,
        )  # fmt: skip
    return packed, absmax


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, block: int, kind: str) -> None:
    """Write the decoded values into out (n,) of any floating dtype."""
    _decode_into(packed, absmax, out, block, kind)


def dequantize_nested(packed: Tensor, nested: nf4.Nested, out: Tensor, block: int, kind: str) -> None:
    """Write the decoded values into out (n,), decoding the scales in the same launch."""
    _decode_into(packed, nested, out, block, kind)


def _decode_into(packed: Tensor, scales: nf4.Scales, out: Tensor, block: int, kind: str) -> None:
    tile = max(TILE // 2, block)
    with on(out.device):
        _decode[(-(-len(out) // tile),)](
            packed, *scale_arguments(scales), nf4.levels(kind, out.device), out, len(out),
            TILE=tile, BLOCK=block, NESTED=isinstance(scales, nf4.Nested), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def decode_plus(
    packed: Tensor,
    scales: nf4.Scales,
    A: Tensor,
    B: Tensor,
    s: float,
    out: Tensor,
    block: int,
    kind: str,
    by: Tensor | None = None,
) -> None:
    """Write W + s·B·A, times `by` where given, into out (out, in) of any strides, summed in fp32, rounded once.

    `by` is dense, fp32, (out, 1) or (1, in). B·A is summed in fp32 of factors rounded to tf32 (relative error below
    1e-3) where `out` has 16 bits or fewer.
    """
    outputs, inputs = out.shape
    if inputs % block:  # a block that spans two rows
        wide = rounding.room(out, by)
        _decode_into(packed, scales, wide.view(-1), block, kind)
        rounding.into(out, wide.addmm_(B.to(wide.dtype), A.to(wide.dtype), alpha=s), by)
        return
    rank = len(A)
    OUT, IN, REPEAT = 64, 64, 4
    RANK = min(64, max(16, triton.next_power_of_2(rank)))
    whole = outputs % (OUT * REPEAT) == 0 and inputs % IN == 0
    with on(out.device):
        _decode_plus[(-(-inputs // IN), -(-outputs // (OUT * REPEAT)))](
            as_words(packed), *scale_arguments(scales), nf4.levels(kind, out.device),
            A.contiguous(), B.contiguous(), float(s), by, out, *out.stride(), rank, inputs, outputs,
            OUT=OUT, IN=IN, RANK=RANK, REPEAT=REPEAT, SINGLE=rank <= RANK, BLOCK=block,
            NESTED=isinstance(scales, nf4.Nested), WHOLE=whole, PRECISION=PRECISIONS.get(out.dtype, "ieee"),
            BOUND=rounding.BOUNDS.get(out.dtype, 0.0), BY_ROW=by is not None and by.shape[1] == 1,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def scale_arguments(scales: nf4.Scales) -> tuple[Tensor | None, ...]:
    """Return the kernels' absmax, codes, outer, offset and table."""
    if isinstance(scales, nf4.Nested):
        return None, scales.codes, scales.absmax, scales.offset, dynamic8.table(scales.codes.device)
    return scales, None, None, None, None


def as_words(packed: Tensor) -> Tensor:
    """Return the codes (n/2,) as (n/8,) int32, copied only where they do not start at a multiple of 4 bytes."""
    packed = packed.view(-1)
    return (packed if packed.data_ptr() % 4 == 0 else packed.clone()).view(torch.int32)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Return what makes `device` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _bounds(kind: str, device: torch.device) -> Tensor:
    """Return the 15 thresholds and a 16th above all."""
    return torch.nn.functional.pad(nf4.thresholds(kind, device), (0, 1), value=torch.inf)


@cache
def _order(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(nf4.ORDER[kind], dtype=torch.int32, device=device)


@triton.jit
def scale_of(absmax, codes, outer, offset, table, i, mask, NESTED: tl.constexpr):
    if NESTED:
        code = tl.load(codes + i, mask=mask, other=0).to(tl.int32)
        scale = tl.load(table + code) * tl.load(outer + i // 256, mask=mask, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + i, mask=mask, other=0.0)
    return scale


@triton.jit
def _look_up(table, code):
    """Return the code's entry of a table of 16, for codes of any shape."""
    return tl.gather(tl.load(table + tl.arange(0, 16)), code.reshape(code.numel), 0).reshape(code.shape)


@triton.jit
def _lane(levels):
    """Return, in lane i of each warp, the level of code i % 16: a scalar that differs between threads, for _values."""
    if INTERPRETED:
        level = levels
    else:
        level = tl.inline_asm_elementwise(
            """{ .reg .u32 lane; .reg .u64 at;
            mov.u32 lane, %laneid; and.b32 lane, lane, 15;
            mad.wide.u32 at, lane, 4, $1; ld.global.nc.f32 $0, [at]; }""",
            "=f,l", [levels.to(tl.int64)], tl.float32, True, 1,
        )  # fmt: skip
    return level


@triton.jit
def _values(pair, lane):
    """Return the two levels of each byte, (..., 2) fp32, first its high half; `lane` from _lane."""
    if INTERPRETED:
        high, low = _look_up(lane, (pair >> 4).to(tl.int32)), _look_up(lane, (pair & 15).to(tl.int32))
    else:
        high, low = tl.inline_asm_elementwise(
            """{ .reg .u32 c;
            shr.u32 c, $8, 4;  shfl.sync.idx.b32 $0, $9, c, 31, -1;
            shr.u32 c, $8, 12; shfl.sync.idx.b32 $1, $9, c, 31, -1;
            shr.u32 c, $8, 20; shfl.sync.idx.b32 $2, $9, c, 31, -1;
            shr.u32 c, $8, 28; shfl.sync.idx.b32 $3, $9, c, 31, -1;
            shfl.sync.idx.b32 $4, $9, $8, 31, -1;
            shr.u32 c, $8, 8;  shfl.sync.idx.b32 $5, $9, c, 31, -1;
            shr.u32 c, $8, 16; shfl.sync.idx.b32 $6, $9, c, 31, -1;
            shr.u32 c, $8, 24; shfl.sync.idx.b32 $7, $9, c, 31, -1; }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f,f,f,f", [pair, lane], (tl.float32, tl.float32), True, 4,
        )  # fmt: skip
    return tl.join(high, low)


@triton.jit
def _decode_tile(
    packed, absmax, codes, outer, offset, table, levels, out, first, left,
    TILE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, TILE // 2)
    b = tl.arange(0, TILE // BLOCK)
    e = tl.arange(0, TILE)
    if WHOLE:  # noqa: SIM108  # Triton: a branch settled while compiling
        pair = tl.load(packed + first // 2 + j)
    else:
        pair = tl.load(packed + first // 2 + j, mask=2 * j < left, other=0)
    scale = scale_of(absmax, codes, outer, offset, table, first // BLOCK + b, b * BLOCK < left, NESTED)
    value = _values(pair, _lane(levels)).reshape(TILE // BLOCK, BLOCK)
    value = (value * scale[:, None]).reshape(TILE).to(out.dtype.element_ty)
    if WHOLE:
        tl.store(out + first + e, value)
    else:
        tl.store(out + first + e, value, mask=e < left)


@triton.jit
def _decode(
    packed, absmax, codes, outer, offset, table, levels, out, n,
    TILE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILE
    left = n - first
    if left >= TILE:
        _decode_tile(packed, absmax, codes, outer, offset, table, levels, out, first, left, TILE, BLOCK, NESTED, True)
    else:
        _decode_tile(packed, absmax, codes, outer, offset, table, levels, out, first, left, TILE, BLOCK, NESTED, False)


@triton.jit
def _rank(unit, bounds):
    """Return how many of the 15 thresholds lie below each value: by halves, so in 4 comparisons."""
    below = tl.where(unit > tl.load(bounds + 7), 8, 0)
    below += tl.where(unit > _look_up(bounds, below + 3), 4, 0)
    below += tl.where(unit > _look_up(bounds, below + 1), 2, 0)
    below += tl.where(unit > _look_up(bounds, below), 1, 0)
    return below


@triton.jit
def _encode(
    x, bounds, order, packed, absmax, n,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILE
    left = n - first
    b = tl.arange(0, TILE // BLOCK)
    e = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if left >= TILE:
        value = tl.load(x + first + e).to(tl.float32)
    else:
        value = tl.load(x + first + e, mask=e < left, other=0.0).to(tl.float32)
    # Magnitudes compared as integers: in this order, and Inf and NaN come out on top.
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    clamped = tl.where(largest > TINY, largest, TINY)
    unit = value * tl.div_rn(tl.full([TILE // BLOCK], 1.0, tl.float32), clamped)[:, None]
    if left < TILE:
        partial = b * BLOCK + BLOCK > left
        unit = tl.where(partial[:, None], tl.div_rn(value, tl.broadcast_to(clamped[:, None], value.shape)), unit)
        largest = tl.where(partial & (largest < TINY), TINY, largest)
    code = _rank(unit, bounds)
    if ORDERED:
        code = _look_up(order, code)
    high, low = tl.split(code.reshape(TILE // 2, 2))
    j = tl.arange(0, TILE // 2)
    pair = ((high << 4) | low).to(tl.uint8)
    if left >= TILE:
        tl.store(packed + first // 2 + j, pair)
    else:
        tl.store(packed + first // 2 + j, pair, mask=2 * j < left)
    tl.store(absmax + first // BLOCK + b, largest, mask=b * BLOCK < left)


@triton.jit
def words(at, row, k, inputs, outputs, IN: tl.constexpr, WHOLE: tl.constexpr):
    """Return the words (OUT, IN / 8) at `at`, columns k to k + IN of rows `row`; zero outside W."""
    if WHOLE:
        word = tl.load(at, mask=tl.full(at.shape, k < inputs, tl.int1), other=0)
    else:
        word = tl.load(at, mask=(row < outputs)[:, None] & (k + 8 * tl.arange(0, IN // 8) < inputs)[None, :], other=0)
    return word


@triton.jit
def values8(word, levels):
    """Return the eight levels of each word of codes, (..., 2, 2, 2) fp32."""
    if INTERPRETED:
        v0, v1 = _look_up(levels, word >> 4 & 15), _look_up(levels, word & 15)
        v2, v3 = _look_up(levels, word >> 12 & 15), _look_up(levels, word >> 8 & 15)
        v4, v5 = _look_up(levels, word >> 20 & 15), _look_up(levels, word >> 16 & 15)
        v6, v7 = _look_up(levels, word >> 28 & 15), _look_up(levels, word >> 24 & 15)
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            """{ .reg .u32 c;
            shr.u32 c, $8, 4;  shfl.sync.idx.b32 $0, $9, c, 31, -1;
            shfl.sync.idx.b32 $1, $9, $8, 31, -1;
            shr.u32 c, $8, 12; shfl.sync.idx.b32 $2, $9, c, 31, -1;
            shr.u32 c, $8, 8;  shfl.sync.idx.b32 $3, $9, c, 31, -1;
            shr.u32 c, $8, 20; shfl.sync.idx.b32 $4, $9, c, 31, -1;
            shr.u32 c, $8, 16; shfl.sync.idx.b32 $5, $9, c, 31, -1;
            shr.u32 c, $8, 28; shfl.sync.idx.b32 $6, $9, c, 31, -1;
            shr.u32 c, $8, 24; shfl.sync.idx.b32 $7, $9, c, 31, -1; }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f", [word, _lane(levels)], (tl.float32,) * 8, True, 1,
        )  # fmt: skip
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def weights(
    packed, absmax, codes, outer, offset, table, levels, row, k, inputs, outputs,
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return a tile of W as levels (OUT, blocks, SPAN) and scales (OUT, blocks): rows `row` (OUT,), columns from k."""
    SPAN: tl.constexpr = BLOCK if BLOCK < IN else IN
    at = packed + row.to(tl.int64)[:, None] * tl.multiple_of(inputs // 8, 4)
    at += (tl.multiple_of(k // 8, 4) + tl.arange(0, IN // 8))[None, :]
    value = values8(words(at, row, k, inputs, outputs, IN, WHOLE), levels).reshape(OUT, IN // SPAN, SPAN)
    column = k + tl.arange(0, IN // SPAN)[None, :] * SPAN
    i = row.to(tl.int64)[:, None] * (inputs // BLOCK) + column // BLOCK
    live = (row < outputs)[:, None] & (column < inputs)
    return value, scale_of(absmax, codes, outer, offset, table, i, live, NESTED)


@triton.jit
def _factor(at, row, column, rows, columns, stride):
    """Return at[row, column] of a matrix (rows, columns) in fp32, zero outside it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(at + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _decode_plus(
    packed, absmax, codes, outer, offset, table, levels, A, B, s, by, out, down, along, rank, inputs, outputs,
    OUT: tl.constexpr, IN: tl.constexpr, RANK: tl.constexpr, REPEAT: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BOUND: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * IN
    column = k + tl.arange(0, IN)
    r = tl.arange(0, RANK)
    right = _factor(A, r, column, rank, inputs, inputs)
    for repeat in range(REPEAT):
        row = (tl.program_id(1) * REPEAT + repeat) * OUT + tl.arange(0, OUT)
        value, scale = weights(
            packed, absmax, codes, outer, offset, table, levels, row, k, inputs, outputs, OUT, IN, BLOCK, NESTED, WHOLE
        )
        change = tl.dot(_factor(B, row, r, outputs, rank, rank), right, input_precision=PRECISION)
        if not SINGLE:
            for first in range(RANK, rank, RANK):
                left = _factor(B, row, first + r, outputs, rank, rank)
                more = _factor(A, first + r, column, rank, inputs, inputs)
                change = tl.dot(left, more, change, input_precision=PRECISION)
        value = (value * scale[:, :, None]).reshape(OUT, IN) + change * s
        if by is not None:
            if BY_ROW:
                value = value * tl.load(by + row, mask=row < outputs, other=0.0)[:, None]
            else:
                value = value * tl.load(by + column, mask=column < inputs, other=0.0)[None, :]
        if BOUND > 0:
            value = tl.where(value > BOUND, BOUND, tl.where(value < -BOUND, -BOUND, value))  # NaN stays
        at = out + row.to(tl.int64)[:, None] * down + column.to(tl.int64)[None, :] * along
        if WHOLE:
            tl.store(at, value.to(out.dtype.element_ty))
        else:
            tl.store(at, value.to(out.dtype.element_ty), mask=(row < outputs)[:, None] & (column < inputs)[None, :])
