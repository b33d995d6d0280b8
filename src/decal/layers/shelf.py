"""A place in pinned host memory for the inputs of layers that backward will run again, with both ways overlapped."""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor


class Parked:
    """A tensor on the shelf, and the one that was put there before it. Forgotten, it gives its memory back."""

    def __init__(self, host: Tensor, room: Tensor | None, device: torch.device, below: Parked | None) -> None:
        self.host: Tensor | None = host
        self.room = room  # the pinned bytes that it lies in
        self.device = device
        self.below = None if below is None else weakref.ref(below)
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None


class Shelf:
    """Copies run on a stream of their own: out while the next layer runs forward, back while the layer above runs

    backward. On a CPU tensors just stay where they are.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by size: pinning memory is slow
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._last: weakref.ref[Parked] | None = None

    def put(self, x: Tensor) -> Parked:
        """Take x; the caller may forget it."""
        if not x.is_cuda:
            return Parked(x, None, x.device, None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]  # torch's
        size = x.numel() * x.element_size()
        whole = 1 << (size - 1).bit_length()  # what torch pins for it; so rows of every width find room again
        room = self._free[whole].pop() if self._free[whole] else torch.empty(whole, dtype=torch.uint8, pin_memory=True)
        host = room[:size].view(x.dtype).view(x.shape)
        here = torch.cuda.current_stream(x.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
            done = self._stream.record_event()
        self._release(here)
        self._leaving = (x, done)  # its memory must not be used again before the copy is done
        parked = Parked(host, room, x.device, None if self._last is None else self._last())
        self._last = weakref.ref(parked)
        return parked

    def take(self, parked: Parked) -> Tensor:
        """Return the tensor on its device, once, and start to bring the one below it."""
        if parked.device.type != "cuda":
            assert parked.host is not None, "a tensor is taken once"
            return parked.host
        here = torch.cuda.current_stream(parked.device)
        self._release(here)
        if parked.coming is None:
            self._fetch(parked)
        assert parked.coming is not None, "it is on its way"
        (x, arrived), parked.coming = parked.coming, None
        here.wait_event(arrived)
        below = None if parked.below is None else parked.below()
        if below is not None and below.host is not None:
            self._fetch(below)
        return x

    def forget(self) -> None:
        """Wait for nothing that was put here: the passes that did so were broken off."""
        self._leaving = self._last = None

    def _fetch(self, parked: Parked) -> None:
        assert self._stream is not None, "what is fetched was put there"
        assert parked.host is not None, "a tensor is taken once"
        x = torch.empty_like(parked.host, device=parked.device)
        self._stream.wait_stream(torch.cuda.current_stream(parked.device))  # x's memory may still be read there
        with torch.cuda.stream(self._stream):
            x.copy_(parked.host, non_blocking=True)
            parked.coming = x, self._stream.record_event()
        # Whoever is given this memory next writes it on the same stream, after the copy.
        assert parked.room is not None, "on a card it lies in pinned memory"
        self._free[len(parked.room)].append(parked.room)
        parked.host = parked.room = None

    def _release(self, here: torch.cuda.Stream) -> None:
        if self._leaving is not None:
            here.wait_event(self._leaving[1])
            self._leaving = None
