"""Optimizer states that leave the card while it is short of memory: explicit copies to pinned host memory and back.

One rule decides, before each step. `free` is what the card could still give at the tightest of two moments: this one,
and the start of the last backward pass, when all activations are there. On the card the states stay while
free >= reserve; from the host they come back when free >= reserve + their own size, so the two never chase each other.
They begin on the host, for nothing is known before the first step.

Where the states are changes no bit of the result: a step on the host copies them over in pieces, steps, copies back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

RESERVE = 1 << 30  # bytes: for what backward still needs beyond its start, and for holes in the allocator's blocks
PIECE = 1 << 22  # elements whose states are on the card at once, unless one tensor is larger


def free_bytes(device: torch.device) -> int:
    """Return what the card could still give: bytes that nobody holds and those that torch's allocator keeps unused."""
    unheld, _ = torch.cuda.mem_get_info(device)
    return unheld + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def quiet(text: str) -> None:
    """Say nothing."""


class Paged(torch.optim.Optimizer):
    """Another optimizer, `inner`, whose states move between the card and the host; it shares its groups and states.

    `free` returns the bytes still free on `device`; `say` is told of each move that costs or saves time. Between steps
    the states in `state` are complete wherever they are.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        device: torch.device,
        free: Callable[[], int],
        reserve: int = RESERVE,
        piece: int = PIECE,
        say: Callable[[str], object] = quiet,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.state = inner, inner.state
        self.device, self.free, self.reserve, self.piece, self.say = device, free, reserve, piece, say
        self.place: Literal["new", "host", "card"] = "new"
        self._seen: list[int] = []  # free bytes since the last step
        # The last parameter is nearest to the loss, so its gradient is there first, before activations are given back.
        last: nn.Parameter = self.param_groups[-1]["params"][-1]
        last.register_post_accumulate_grad_hook(self._look)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Decide where the states are, then step there; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        if self.place == "card":
            self.inner.param_groups = self.param_groups
            self.inner.step()
            return loss
        for group in self.param_groups:
            for piece in pieces(group["params"], self.piece):
                self._move(piece, self._to_card)
                self.inner.param_groups = [{**group, "params": piece}]
                self.inner.step()
                self._move(piece, self._to_host)
        self._wait()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over another optimizer's state, paged or not."""
        self.inner.param_groups = self.param_groups
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state, self.place = self.inner.param_groups, self.inner.state, "new"

    def _look(self, _: Tensor) -> None:
        self._seen.append(self.free())

    def _settle(self) -> None:
        """Choose where this step finds the states, and move them there."""
        least, self._seen = min([*self._seen, self.free()]), []
        size = sum(t.nbytes for state in self.state.values() for t in state.values() if _pages(t))
        everyone = [p for group in self.param_groups for p in group["params"]]
        short = least < self.reserve + (0 if self.place == "card" else size)
        if short and (self.place == "card" or (self.place == "new" and size)):
            self._move(everyone, self._to_host)
            self._wait()
            self.say(
                f"the card is short of memory ({_gib(least)} free, {_gib(self.reserve)} are kept so): optimizer states "
                f"({_gib(size)}) are in host memory; steps are slower, results the same"
            )
            self.place = "host"
        elif not short and size and self.place != "card":
            self._move(everyone, self._to_card)
            if self.place == "host":
                self.say(f"optimizer states ({_gib(size)}) are back on the card, which has {_gib(least)} free")
            self.place = "card"

    def _move(self, parameters: Iterable[nn.Parameter], copy: Callable[[Tensor], Tensor]) -> None:
        for p in parameters:
            state = self.state.get(p, {})
            for slot, value in state.items():
                if _pages(value):
                    state[slot] = copy(value)

    def _to_card(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True, copy=self.device.type == "cpu")

    def _to_host(self, value: Tensor) -> Tensor:
        # Pinned blocks come from torch's cache and are not given out again while a copy from or to them is under way.
        pin = self.device.type == "cuda"
        if pin and value.is_pinned():
            return value
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=pin).copy_(value, non_blocking=True)

    def _wait(self) -> None:
        """Let the copies end, so that whoever reads the states on the host finds them whole."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def pieces(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in lists of at most `limit` elements together; a larger one is alone."""
    piece: list[nn.Parameter] = []
    elements = 0
    for p in parameters:
        if piece and elements + p.numel() > limit:
            yield piece
            piece, elements = [], 0
        piece.append(p)
        elements += p.numel()
    if piece:
        yield piece


def _pages(value: Tensor) -> bool:
    return value.ndim > 0  # counts of steps stay where the optimizer put them


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
