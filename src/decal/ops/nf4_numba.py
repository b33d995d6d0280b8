"""The 4-bit codec on a CPU: ops/nf4.py compiled by numba, on as many threads as torch uses, equal bit for bit.

Compiled once for a machine and kept beside this file (or in numba's own cache folder).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from decal.ops import nf4

CHUNK = 1 << 20  # elements widened or rounded at a time where numpy has no such dtype; a multiple of every block size
ALONE = 1 << 17  # elements below which one thread is enough
COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


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
        _in_threads(_encode, arguments, len(scales), len(x))
    return packed, absmax


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, block: int, kind: str) -> None:
    """Write the decoded values into the flat tensor `out` of any floating dtype."""
    table, n = nf4.levels(kind, packed.device).numpy(), len(out)
    codes, scales = packed.numpy(), absmax.numpy()
    if out.dtype == torch.float32:
        _in_threads(_decode, (codes, scales, table, out.numpy(), block), len(scales), n)
        return
    wide = torch.empty(min(n, CHUNK), dtype=torch.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part = wide[: stop - start]
        first, last = start // block, -(-stop // block)
        arguments = (codes[start // 2 :], scales[first:last], table, part.numpy(), block)
        _in_threads(_decode, arguments, last - first, stop - start)
        out[start:stop].copy_(part)


def _in_threads(work: Callable[..., None], arguments: tuple[Any, ...], blocks: int, elements: int) -> None:
    """Run work(*arguments, first, last) over all blocks, in equal shares."""
    threads = 1 if elements < ALONE else torch.get_num_threads()
    if threads == 1:
        work(*arguments, 0, blocks)
        return
    edges = [blocks * i // threads for i in range(threads + 1)]
    shares = [_pool(threads).submit(work, *arguments, *edge) for edge in pairwise(edges)]
    for share in shares:
        share.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decal-nf4")


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
    n, tiny, rising = len(x), np.float32(1e-38), order[0] == 0  # NF4's codes rise with its levels, FP4's do not
    codes = np.empty(4096, np.uint8)  # of the largest block
    t0, t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]
    t8, t9, t10, t11, t12, t13, t14 = t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    for b in range(first, last):
        start, stop = b * block, min((b + 1) * block, n)
        largest = np.uint32(0)
        for i in range(start, stop):  # magnitudes compared as integers: in this order, and Inf and NaN come out on top
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        absmax_bits[b] = largest
        whole = stop - start == block
        if not whole:
            absmax[b] = max(absmax[b], tiny)
        scale = np.float32(1) / max(absmax[b], tiny)
        for i in range(start, stop):
            v = x[i] * scale
            if not whole:
                v = x[i] / absmax[b]
            codes[i - start] = (
                np.uint8(v > t0) + np.uint8(v > t1) + np.uint8(v > t2) + np.uint8(v > t3) + np.uint8(v > t4)
                + np.uint8(v > t5) + np.uint8(v > t6) + np.uint8(v > t7) + np.uint8(v > t8) + np.uint8(v > t9)
                + np.uint8(v > t10) + np.uint8(v > t11) + np.uint8(v > t12) + np.uint8(v > t13) + np.uint8(v > t14)
            )  # fmt: skip
        half = start // 2
        if (stop - start) % 2:
            codes[stop - start] = 7  # the level of zero
        if not rising:
            for i in range((stop - start + 1) // 2 * 2):
                codes[i] = order[codes[i]]
        for i in range((stop - start + 1) // 2):
            packed[half + i] = (codes[2 * i] << 4) | codes[2 * i + 1]
