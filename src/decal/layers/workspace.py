"""One reused buffer per device, stream and dtype: the place where W + s·B·A is written before it is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFERS: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


def buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory of `shape`, shared by all layers: valid until the next call on this stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, dtype)
    size = 1
    for length in shape:
        size *= length
    if key not in _BUFFERS or _BUFFERS[key].numel() < size:
        _BUFFERS[key] = torch.empty(size, dtype=dtype, device=device)
    return _BUFFERS[key][:size].view(shape)


def release() -> None:
    """Give the buffers back (after training, or between measurements of memory)."""
    _BUFFERS.clear()
