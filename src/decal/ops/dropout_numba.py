"""Dropout on a CPU: ops/dropout.py compiled by numba, on as many threads as torch uses, equal bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint32
from torch import Tensor

from decal.ops import workspace
from decal.ops.threads import COMPILED, in_threads


def drop(x: Tensor, low: int, high: int, edge: int, scale: float) -> Tensor:
    """Return x, fp32 or fp64, with some numbers 0 and the others times `scale`, as ops/dropout.py does."""
    out = workspace.fresh(x.shape, x)
    source, words = x.detach().contiguous().view(-1), np.array([low, high], dtype=np.int32).view(np.uint32)
    factor = source.new_tensor(scale).numpy()[()]
    arguments = (source.numpy(), out.view(-1).numpy(), words[0], words[1], np.int32(edge), factor)
    in_threads(_drop, arguments, len(source), len(source))
    return out


@njit(**COMPILED)  # type: ignore[untyped-decorator]  # numba's
def _drop(x: Any, out: Any, low: Any, high: Any, edge: Any, scale: Any, first: int, last: int) -> None:
    source, target = x[first:last], out[first:last]
    start = uint32(uint32(first) + low)
    for i in range(len(source)):  # every step named as 32 bits, and no branch: eight numbers at a time then
        h = _mixed(uint32(_mixed(uint32(uint32(i) + start)) ^ high))
        target[i] = source[i] * scale * source.dtype.type(np.int32(h) >= edge)


@njit(**COMPILED)  # type: ignore[untyped-decorator]  # numba's
def _mixed(h: Any) -> Any:
    h = uint32((h ^ (h >> uint32(16))) * uint32(0x85EBCA6B))
    h = uint32((h ^ (h >> uint32(13))) * uint32(0xC2B2AE35))
    return uint32(h ^ (h >> uint32(16)))
