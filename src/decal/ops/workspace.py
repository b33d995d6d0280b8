"""Memory for what lives only for a moment: one reused buffer per device, stream and dtype, and outputs without holes.

The buffer is where W + s·B·A is written before it is multiplied, and where an activation that is made again lies while
one gradient is formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from decal.ops import select

_BUFFERS: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory of `shape`, shared by all layers: valid until the next call on this stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, dtype)
    size = math.prod(shape)
    if key not in _BUFFERS or _BUFFERS[key].numel() < size:
        _BUFFERS[key] = torch.empty(size, dtype=dtype, device=device)
    return _BUFFERS[key][:size].view(shape)


SPARE = 4096  # bytes


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return uninitialised memory of `shape`, with `like`'s dtype and device, that malloc can give out again.

    torch asks malloc for aligned blocks, and glibc looks for size + alignment when it fills such a request: a freed
    block never serves an equal one. A few spare bytes close that hole; over a step of 30 layers it grew to 0.4 GiB.
    """
    if select.habits(like.device) != "cpu":
        return torch.empty(*shape, dtype=like.dtype, device=like.device)
    size = math.prod(shape)
    return torch.empty(size + SPARE // like.element_size(), dtype=like.dtype)[:size].view(*shape)


def held() -> tuple[Tensor, ...]:
    """Return the buffers that there are, for whoever will read their addresses again: a larger one replaces them."""
    return tuple(_BUFFERS.values())


def release() -> None:
    """Give the buffers back (after training, or between measurements of memory)."""
    _BUFFERS.clear()


@contextmanager
def apart() -> Iterator[dict[tuple[torch.device, int, torch.dtype], Tensor]]:
    """Use other buffers inside the block, yielded and then given back: those of tensors without values hold nothing."""
    global _BUFFERS
    before, _BUFFERS = _BUFFERS, {}
    try:
        yield _BUFFERS
    finally:
        _BUFFERS = before
