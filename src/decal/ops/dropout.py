"""Dropout of an adapter's input whose mask is never stored: a seed says what is dropped, and backward asks it again.

Number i of a tensor is kept or not by a hash of i and the seed, so that any part can be drawn anywhere, at any time
and on any device, with one result. The hash is MurmurHash3's finaliser (Appleby 2011), twice, each with half of the
seed; dropout of x in front of A is LoRA's own (Hu et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.ops import remake, select
from decal.ops.fuse import region
from decal.ops.merged import as_computed

WORD = 1 << 32


@dataclass(frozen=True)
class Drop:
    """Numbers become 0 with probability p and are divided by 1 - p otherwise; `seed` (64 bits) says which."""

    p: float
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return x with some numbers dropped, always the same ones of a shape; autograd does not see it."""
        x = x.detach()
        kind = select.kind(x.device)
        if kind == "shapes" and select.habits(x.device) == "cpu":
            return torch.empty_like(x)  # all that the compiled loop makes
        low, high = (_signed(word) for word in (self.seed % WORD, self.seed // WORD))
        edge = _signed(int(self.p * WORD) + WORD // 2)  # hashes are read as signed numbers
        if kind == "numba" and x.dtype in (torch.float32, torch.float64):
            from decal.ops import dropout_numba  # numba takes a second to import

            return dropout_numba.drop(x, low, high, edge, 1 / (1 - self.p))
        # In tensors, filled without waiting for the card: for another number torch.compile would compile again.
        first, second = (torch.full((), word, dtype=torch.int32, device=x.device) for word in (low, high))
        return drop(x, first, second, edge, 1 / (1 - self.p))


def quick(device: torch.device) -> bool:
    """Return whether masks are drawn faster here than by torch; in plain PyTorch it takes three times as long."""
    return select.habits(device) != "cpu" or select.installed("numba")


def drawn(p: float, device: torch.device) -> Drop:
    """Return what a pass drops; its seed is the next number of torch's global generator, which checkpoints keep."""
    if select.kind(device) == "shapes":
        return Drop(p, 0)
    return Drop(p, int(torch.randint(-(1 << 63), (1 << 63) - 1, ())) % (1 << 64))


@region
def drop(x: Tensor, low: Tensor, high: Tensor, edge: int, scale: float) -> Tensor:
    """Return x with some numbers 0 and the others times `scale`. The seed's halves (int32) and the edge are signed.

    What is not finite and dropped becomes NaN, as in torch's own dropout.
    """
    i = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    return x * scale * (_mixed(_mixed(i + low) ^ high) >= edge)


def _mixed(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit words; shifts are logical."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _signed(0x85EBCA6B)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * _signed(0xC2B2AE35)
    return h ^ ((h >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    word %= WORD
    return word - WORD if word >= WORD // 2 else word


class _Projected(torch.autograd.Function):
    """drop(x) Aᵀ; x is kept as it is, which other layers keep, too, or made again (ops/remake.py)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, dropped: Drop, operation: remake.Cheap | None, *made_from: Tensor
    ) -> Tensor:
        ctx.save_for_backward(A, *(made_from or (x,)))
        ctx.dropped, ctx.operation = dropped, operation
        with torch.autocast(x.device.type, enabled=False):
            return dropped(x) @ A.to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dS: Tensor) -> tuple[Tensor | None, ...]:
        A, *kept = ctx.saved_tensors
        dx = dA = None
        with torch.autocast(dS.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                x = kept[0] if ctx.operation is None else ctx.operation.forward(*kept)
                dA = dS.flatten(0, -2).T @ ctx.dropped(x).flatten(0, -2)
            if ctx.needs_input_grad[0]:
                dx = ctx.dropped(dS @ A.to(dS.dtype))
        return dx, dA, *[None] * (len(ctx.needs_input_grad) - 2)


def projected(x: Tensor, A: Tensor, dropped: Drop) -> Tensor:
    """Return drop(x) Aᵀ, (..., in) -> (..., r), in autocast's dtype where that is on. Double backward raises."""
    x = as_computed(x)
    recipe = remake.recipe(x)
    operation, inputs = (None, ()) if recipe is None else (recipe.operation, recipe.inputs)
    out: Tensor = _Projected.apply(x, A, dropped, operation, *inputs)  # type: ignore[no-untyped-call]
    return out
