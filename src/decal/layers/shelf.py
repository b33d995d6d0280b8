"""A place in pinned host memory for the inputs of layers that backward will run again, with both ways overlapped."""

from __future__ import annotations

import torch
from torch import Tensor


class Shelf:
    """Holds one tensor for each layer. Copies run on a stream of their own: out while the next layer runs, back while

    the layer above runs backward. On a CPU tensors just stay where they are.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._host: dict[int, Tensor] = {}  # flat bytes, kept between steps: pinning is slow
        self._out: dict[int, Tensor] = {}
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def put(self, index: int, x: Tensor) -> None:
        """Take x of layer `index`; the caller may forget it."""
        if not x.is_cuda:
            self._out[index] = x
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        host = self._room(index, x)
        here = torch.cuda.current_stream(x.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
            done = self._stream.record_event()
        self._release(here)
        self._leaving = (x, done)  # its memory must not be reused before the copy is done
        self._out[index] = host

    def take(self, index: int, device: torch.device) -> Tensor:
        """Return x of layer `index` on its device, and start to bring that of the layer below."""
        if device.type != "cuda":
            return self._out.pop(index)
        here = torch.cuda.current_stream(device)
        self._release(here)
        if index not in self._coming:
            self._fetch(index, device)
        x, arrived = self._coming.pop(index)
        here.wait_event(arrived)
        if index - 1 in self._out:
            self._fetch(index - 1, device)
        return x

    def _fetch(self, index: int, device: torch.device) -> None:
        assert self._stream is not None, "what is fetched was put there"
        host = self._out.pop(index)
        x = torch.empty_like(host, device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # x may be memory that is still read there
        with torch.cuda.stream(self._stream):
            x.copy_(host, non_blocking=True)
            self._coming[index] = x, self._stream.record_event()

    def _release(self, here: torch.cuda.Stream) -> None:
        if self._leaving is not None:
            here.wait_event(self._leaving[1])
            self._leaving = None

    def _room(self, index: int, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        if index not in self._host or len(self._host[index]) < size:
            self._host[index] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._host[index][:size].view(x.dtype).view(x.shape)
