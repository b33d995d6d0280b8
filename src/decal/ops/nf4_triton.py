"""The 4-bit codec on a CUDA card, as Triton kernels: ops/nf4.py's results bit for bit, and two products with the codes.

Decoding reads each byte of codes once and looks both levels up in a table of 16 floats that stays in the first-level
cache: 16 neighbouring words never collide there, so a warp's 32 look-ups cost one access. Scales stored in 8 bits are
decoded in the same launch. No multiplication is fused with an addition where bits must agree (enable_fp_fusion=False).

`multiply` holds W only in registers: for one row it sums level · x in fp32 and scales each block's sum, so W is not
rounded at all; for 2 to 32 rows it rounds W to the dtype of x as `dequantize` would and sums on the tensor cores.

Shapes: n elements, m = ceil(n/block) scales, W (out, in), x (rows, in), A (r, in), B (out, r).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096  # elements a program encodes or decodes: the largest block
MULTIPLY_ROWS = 32
ROUNDED = {torch.float32: "ieee", torch.float16: "tf32", torch.bfloat16: "tf32"}  # B·A, by what it is rounded to next


@triton.jit
def _scale(absmax, codes, outer, offset, table, i, mask, NESTED: tl.constexpr):
    if NESTED:
        code = tl.load(codes + i, mask=mask, other=0).to(tl.int32)
        value = tl.load(table + code) * tl.load(outer + i // 256, mask=mask, other=0.0)
        scale = value + tl.load(offset)
    else:
        scale = tl.load(absmax + i, mask=mask, other=0.0)
    return scale


@triton.jit
def _level(levels, code, GATHER: tl.constexpr):
    if GATHER:
        flat = tl.gather(tl.load(levels + tl.arange(0, 16)), code.to(tl.int32).reshape(code.numel), 0)
        value = flat.reshape(code.shape)
    else:
        value = tl.load(levels + code.to(tl.uint32))
    return value


@triton.jit
def _decode(
    packed, absmax, codes, outer, offset, table, levels, out, n,
    TILE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILE
    j = tl.arange(0, TILE // 2)
    b = tl.arange(0, TILE // BLOCK)
    e = tl.arange(0, TILE)
    if WHOLE:
        pair = tl.load(packed + first // 2 + j)
        scale = _scale(absmax, codes, outer, offset, table, first // BLOCK + b, None, NESTED)
    else:
        left = n - first
        pair = tl.load(packed + first // 2 + j, mask=2 * j < left, other=0)
        scale = _scale(absmax, codes, outer, offset, table, first // BLOCK + b, b * BLOCK < left, NESTED)
    value = _level(levels, tl.join(pair >> 4, pair & 15), GATHER)
    value = (value.reshape(TILE // BLOCK, BLOCK) * scale[:, None]).reshape(TILE).to(out.dtype.element_ty)
    if WHOLE:
        tl.store(out + first + e, value)
    else:
        tl.store(out + first + e, value, mask=e < n - first)
