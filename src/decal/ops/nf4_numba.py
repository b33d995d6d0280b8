"""The 4-bit codec on a CPU: ops/nf4.py compiled by numba, on as many threads as torch uses, equal bit for bit.

Compiled once for a machine and kept beside this file (or in numba's own cache folder).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from decal.ops import nf4
from decal.ops.threads import COMPILED, in_threads

CHUNK = 1 << 20  # elements widened or rounded at a time where numpy has no such dtype; a multiple of every block size
GROUP = 4096  # elements coded at a time: the largest block


def quantize(flat: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return packed codes and absmax of a flat tensor; absmax is Inf or NaN where a block holds one."""
    n = len(flat)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-n // block), dtype=torch.float32)
    bounds = nf4.thresholds(kind, flat.device).numpy()
    order = np.array(nf4.ORDER[kind], dtype=np.uint8)
    for start in range(0, n, CHUNK):
        x = flat[start : start + CHUNK].float().numpy()
        part = packed[start // 2 : (start + len(x) + 1) // 2].numpy()
        scales = absmax[start // block : -(-(start + len(x)) // block)].numpy()
        arguments = (x, x.view(np.uint32), bounds, order, part, scales, scales.view(np.uint32), block)
        in_threads(_encode, arguments, len(scales), len(x))
    return packed, absmax


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, block: int, kind: str) -> None:
    """Write the decoded values into the flat tensor `out` of any floating dtype."""
    table, n = nf4.levels(kind, packed.device).numpy(), len(out)
    codes, scales = packed.numpy(), absmax.numpy()
    if out.dtype == torch.float32:
        in_threads(_decode, (codes, scales, table, out.numpy(), block), len(scales), n)
        return
    wide = torch.empty(min(n, CHUNK), dtype=torch.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part = wide[: stop - start]
        first, last = start // block, -(-stop // block)
        arguments = (codes[start // 2 :], scales[first:last], table, part.numpy(), block)
        in_threads(_decode, arguments, last - first, stop - start)
        out[start:stop].copy_(part)


@njit(**COMPILED)  # type: ignore[untyped-decorator]  # numba has no types
def _decode(packed: Any, absmax: Any, table: Any, out: Any, block: int, first: int, last: int) -> None:
    n = len(out)
    for b in range(first, last):
        scale = absmax[b]
        start, stop = b * block, min((b + 1) * block, n)
        for i in range(start // 2, stop // 2):
            pair = packed[i]
            out[2 * i] = table[pair >> 4] * scale
            out[2 * i + 1] = table[pair & 15] * scale
        if stop % 2:
            out[stop - 1] = table[packed[stop // 2] >> 4] * scale


@njit(**COMPILED)  # type: ignore[untyped-decorator]  # numba has no types
def _encode(
    x: Any, bits: Any, t: Any, order: Any, packed: Any, absmax: Any, absmax_bits: Any, block: int, first: int, last: int
) -> None:
    rising = order[0] == 0  # NF4's codes rise with its levels, FP4's do not
    unit, codes = np.empty(GROUP, np.float32), np.empty(GROUP + 1, np.uint8)
    for b in range(first, last, GROUP // block):
        start, stop = b * block, min(min(b + GROUP // block, last) * block, len(x))
        _divide(x, bits, absmax, absmax_bits, unit, block, start, stop)
        size = stop - start
        _rank(unit, t, codes, size)
        if size % 2:
            codes[size] = 7  # the level of zero
            size += 1
        if not rising:
            for i in range(size):
                codes[i] = order[codes[i]]
        half = start // 2
        for i in range(size // 2):
            packed[half + i] = (codes[2 * i] << 4) | codes[2 * i + 1]


@njit(**COMPILED)  # type: ignore[untyped-decorator]  # numba has no types
def _divide(x: Any, bits: Any, absmax: Any, absmax_bits: Any, unit: Any, block: int, first: int, last: int) -> None:
    """Write x / absmax of each block into unit, for elements first to last; and absmax."""
    tiny = np.float32(1e-38)
    for start in range(first, last, block):
        b, stop, to = start // block, min(start + block, last), start - first
        largest = np.uint32(0)
        for i in range(start, stop):  # magnitudes compared as integers: in this order, and Inf and NaN come out on top
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        absmax_bits[b] = largest
        if stop - start == block:
            scale = np.float32(1) / max(absmax[b], tiny)
            for i in range(block):
                unit[to + i] = x[start + i] * scale
        else:
            absmax[b] = max(absmax[b], tiny)
            for i in range(stop - start):
                unit[to + i] = x[start + i] / absmax[b]


@njit(**COMPILED)  # type: ignore[untyped-decorator]  # numba has no types
def _rank(unit: Any, t: Any, codes: Any, size: int) -> None:
    """Write how many of the 15 thresholds lie below each value: counted in floats, for that is compiled to vectors."""
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    for i in range(size):
        v = unit[i]
        below = _over(v, t0) + _over(v, t1) + _over(v, t2) + _over(v, t3) + _over(v, t4)
        below += _over(v, t5) + _over(v, t6) + _over(v, t7) + _over(v, t8) + _over(v, t9)
        below += _over(v, t10) + _over(v, t11) + _over(v, t12) + _over(v, t13) + _over(v, t14)
        codes[i] = np.uint8(np.int32(below))


@njit(inline="always")
def _over(v: Any, threshold: Any) -> Any:
    return np.float32(1) if v > threshold else np.float32(0)
