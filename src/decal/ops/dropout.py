"""Dropout of an adapter's input whose mask is never stored: a seed says what is dropped, and backward asks it again.

Number i of a tensor is kept or not by a hash of i and the seed, so that any part can be drawn anywhere, at any time
and on any device, with one result. The hash is MurmurHash3's finaliser (Appleby 2011), twice, each with half of the
seed; dropout of x in front of A is LoRA's own (Hu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.ops import remake, select, workspace
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


Weight = Callable[[torch.dtype], Tensor]  # dtype -> W (out, in), perhaps in the shared buffer


class _Beside(torch.autograd.Function):
    """Forward and backward of `beside`. Only x is kept, as other layers keep it, too, or made again (ops/remake.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        s: float,
        dropped: Drop,
        weight: Weight | None,
        operation: remake.Cheap | None,
        *made_from: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(A, B, *(made_from or (x,)))
        ctx.s, ctx.dropped, ctx.weight, ctx.operation = s, dropped, weight, operation
        with torch.autocast(x.device.type, enabled=False):
            S_NR = (dropped(x).flatten(0, -2) @ A.to(x.dtype).T).mul_(s)
            y = workspace.fresh((*x.shape[:-1], len(B)), x)
            y_NO = torch.mm(S_NR, B.to(x.dtype).T, out=y.flatten(0, -2))
            if bias is not None:
                y_NO += bias.to(x.dtype)
            if weight is not None:
                # The product's sum starts from the change: added to a rounded 16-bit y, a small one would be lost.
                y_NO.addmm_(x.flatten(0, -2), weight(x.dtype).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, B, *kept = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_bias, *others = ctx.needs_input_grad
        dx = dA = dB = None
        with torch.autocast(dy.device.type, enabled=False):
            dy_NO, A, B = dy.flatten(0, -2), A.to(dy.dtype), B.to(dy.dtype)
            T_NR = (dy_NO @ B).mul_(ctx.s)
            if needs_A or needs_B:
                x = kept[0] if ctx.operation is None else ctx.operation.forward(*kept)
                x_ND = ctx.dropped(x).flatten(0, -2)
                dA = T_NR.T @ x_ND
                dB = dy_NO.T @ (x_ND @ A.T).mul_(ctx.s)
                del x, x_ND  # their memory can serve dx
            if needs_x:
                dx = workspace.fresh((*dy.shape[:-1], A.shape[1]), dy)
                torch.mm(T_NR, A, out=dx.flatten(0, -2))
                dx = ctx.dropped(dx)
                if ctx.weight is not None:
                    dx.flatten(0, -2).addmm_(dy_NO, ctx.weight(dy.dtype))
            dbias = dy_NO.sum(0) if needs_bias else None  # LoraConfig(bias=...) trains it
        return dx, dA, dB, dbias, *[None] * len(others)


def beside(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    dropped: Drop,
    *,
    weight: Weight | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return s·drop(x) Aᵀ Bᵀ, and x Wᵀ + bias with it where given: (..., in) -> (..., out).

    In autocast's dtype where that is on. Double backward raises.
    """
    x = as_computed(x)
    recipe = remake.recipe(x)
    operation, inputs = (None, ()) if recipe is None else (recipe.operation, recipe.inputs)
    out: Tensor = _Beside.apply(x, A, B, bias, s, dropped, weight, operation, *inputs)  # type: ignore[no-untyped-call]
    return out
