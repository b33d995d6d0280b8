"""y = x (W + s·B·A)ᵀ with W' formed in a reused buffer: one large product forward and one for the input's gradient.

The buffer is overwritten by the next layer, so W' is never saved: backward forms it again, from the A and B that
autograd kept (and version-checks: an optimizer step or a load between forward and backward raises). An input that
knows how it was made is not saved either (see ops/remake.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from decal.ops import remake, workspace

FormWeight = Callable[[Tensor, Tensor, torch.dtype], Tensor]  # (A, B, dtype) -> W + s·B·A, in a reused buffer


class _Merged(torch.autograd.Function):
    """Forward and backward of `merged_linear`; the frozen weight gets no gradient; the input, A, B and the bias do."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        s: float,
        form: FormWeight,
        operation: remake.Cheap | None,
        *made_from: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(A, B, *(made_from or (x,)))
        ctx.s, ctx.form, ctx.operation = s, form, operation
        return F.linear(x, form(A, B, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, B, *kept = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            W = ctx.form(A, B, dy.dtype)
            dx = workspace.fresh((*dy.shape[:-1], W.shape[1]), dy)
            torch.mm(dy.flatten(0, -2), W, out=dx.flatten(0, -2))
        x = kept[0] if ctx.operation is None else ctx.operation.forward(*kept)
        x_ND, dy_NO = x.flatten(0, -2), dy.flatten(0, -2)
        A, B = A.to(dy.dtype), B.to(dy.dtype)
        dA = (dy_NO @ B).T @ x_ND * ctx.s if ctx.needs_input_grad[1] else None
        dB = dy_NO.T @ (x_ND @ A.T) * ctx.s if ctx.needs_input_grad[2] else None
        dbias = dy_NO.sum(0) if ctx.needs_input_grad[3] else None  # LoraConfig(bias=...) trains it
        return dx, dA, dB, dbias, *[None] * (len(ctx.needs_input_grad) - 4)


def as_computed(x: Tensor) -> Tensor:
    """Return x in autocast's dtype, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def merged_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, s: float, form: FormWeight) -> Tensor:
    """Return x (W + s·B·A)ᵀ + bias, (..., in) -> (..., out), in autocast's dtype where that is on.

    `form` writes W + s·B·A. Double backward raises.
    """
    x = as_computed(x)
    recipe = remake.recipe(x)
    operation, inputs = (None, ()) if recipe is None else (recipe.operation, recipe.inputs)
    out: Tensor = _Merged.apply(x, A, B, bias, s, form, operation, *inputs)  # type: ignore[no-untyped-call]
    return out


class _Frozen(torch.autograd.Function):
    """x Wᵀ + change for a frozen W that is stored in another form: formed again in backward, never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Callable[[torch.dtype], Tensor], change: Tensor | None) -> Tensor:
        ctx.dense = dense
        ctx.change = None if change is None else change.dtype
        with torch.autocast(x.device.type, enabled=False):
            W = dense(x.dtype)
            if change is None:
                return F.linear(x, W)
            # The product's sum starts from the change: added to a rounded 16-bit y, a small one would be lost.
            y = torch.addmm(change.flatten(0, -2).to(x.dtype), x.flatten(0, -2), W.T)
            return y.view(change.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = dy @ ctx.dense(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None if ctx.change is None else dy.to(ctx.change)


def frozen_linear(x: Tensor, dense: Callable[[torch.dtype], Tensor], change: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + change, (..., in) -> (..., out), rounded once; `dense(dtype)` gives W, which is not kept."""
    out: Tensor = _Frozen.apply(x, dense, change)  # type: ignore[no-untyped-call]  # torch's Function is untyped
    return out
