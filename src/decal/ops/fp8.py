"""Products of frozen weights in 8-bit floats (e4m3, 4 bits of exponent and 3 of mantissa), forward and backward.

Both operands are rounded as they are multiplied, each row along the sum on a scale of its own: of activations and
gradients so that its largest number becomes the format's largest, of weights by a bound of that, which costs a float no
precision and spares a pass over W + s·B·A. Sums are fp32, and results 16-bit. Rounding costs 2.6% of a number and 3.7%
of a product's size, so this is for who asks for it (`train.precision=fp8`). The factors' own gradients stay products
of 16-bit numbers.

The change s·B·A is added to W before it is rounded, never to y after it: a 16-bit y would round a young adapter away,
every time the same way. In W it moves some entries over the edge to the next number, and over a row's sum their mean is
the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from decal.ops import rounding, select, workspace
from decal.ops.fuse import region
from decal.ops.products import Factors, Group, Product, Projected
from decal.ops.select import NotCompiled

FORMAT = torch.float8_e4m3fn
LARGEST = rounding.BOUNDS[FORMAT]
SMALLEST = torch.finfo(torch.float32).tiny * LARGEST  # what a row of zeros is divided by in its place
ROUNDING = 2**-4  # of a number, at most: half of the last of 3 bits after the leading one
ALIGNED = 16  # what inputs and outputs must be multiples of (cuBLAS)
Narrow = tuple[Tensor, Tensor]  # numbers in FORMAT, (M, K); what each row is multiplied by, (M, 1) in fp32


def rows(x: Tensor) -> Narrow:
    """Return x (M, K) in 8 bits, each row on its own scale."""
    if select.kind(x.device) == "triton" and x.stride(1) == 1:
        from decal.ops import fp8_triton

        with suppress(NotCompiled):
            return select.tried("rows in 8 bits", partial(fp8_triton.rows, x, LARGEST, SMALLEST))
    return _rows(x)


@region
def _rows(x: Tensor) -> Narrow:
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


@region
def scales(largest: Tensor, own: Tensor, other: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return the scale of each row (M, 1) of W + s·own·other, (M, r) and (r, K), and what to multiply the row by.

    `largest` (M,) bounds |W|. Rows may be columns: then `own` is Aᵀ and `other` Bᵀ.
    """
    change = (own.float().abs() * other.float().abs().amax(1)).sum(1)
    scale = (largest + abs(s) * change).clamp(min=SMALLEST)[:, None] / LARGEST
    return scale, 1 / scale


@region
def rounded(W: Tensor, by: Tensor) -> Tensor:
    """Return W (O, D), times `by` (O, 1), in 8 bits."""
    return (W.float() * by).clamp(-LARGEST, LARGEST).to(FORMAT)


@region
def rounded_sum(W: Tensor, change: Tensor, s: float, by: Tensor) -> Tensor:
    """Return W + s·change (O, D), times `by` (O, 1), in 8 bits."""
    return ((W.float() + s * change.float()) * by).clamp(-LARGEST, LARGEST).to(FORMAT)


@region
def turned(W: Tensor, by: Tensor) -> Tensor:
    """Return the transpose (D, O) of W (O, D), times `by` (D, 1), in 8 bits."""
    return (W.float().t() * by).clamp(-LARGEST, LARGEST).to(FORMAT).contiguous()


@region
def turned_sum(W: Tensor, change: Tensor, s: float, by: Tensor) -> Tensor:
    """Return the transpose (D, O) of W + s·change, times `by` (D, 1), in 8 bits."""
    return ((W.float() + s * change.float()).t() * by).clamp(-LARGEST, LARGEST).to(FORMAT).contiguous()


def times(x: Narrow, W: Narrow, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return x Wᵀ, (N, O), for x (N, D) and W (O, D)."""
    # The quick sum: on Hopper's cards partial sums are kept in 22 bits, far finer than what is summed.
    run = partial(
        torch._scaled_mm,
        x[0],
        W[0].t(),
        scale_a=x[1],
        scale_b=W[1].t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    if out is None:
        return run()
    return run(out=out) if out.is_contiguous() else out.copy_(run())


@dataclass(frozen=True)
class Group8(Group):
    """Products of the same input in 8-bit floats; `merged` is of no account."""

    def forward(
        self, x_ND: Tensor, factors: Sequence[Factors], outs: Sequence[Tensor], whole: Tensor | None = None
    ) -> None:
        """Write the products into `outs`, each (N, O)."""
        x = rows(x_ND)
        for product, pair, out in zip(self.products, factors, outs, strict=True):
            times(x, self._narrow(product, pair, x_ND, turn=False), x_ND.dtype, out)
            if product.bias is not None:
                out += product.bias

    def added(self, x_ND: Tensor, factors: Sequence[Factors], plus_NO: Tensor) -> Tensor | None:
        """Return None: such a product starts from nothing."""
        return None

    def input_gradient(
        self,
        dys: Sequence[Tensor],
        factors: Sequence[Factors],
        projected: Projected | None,
        whole: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of x."""
        dx: Tensor | None = None
        for product, pair, dy in zip(self.products, factors, dys, strict=True):
            part = times(rows(dy), self._narrow(product, pair, dy, turn=True), dy.dtype)
            dx = part if dx is None else dx.add_(part)
        assert dx is not None, "a group has products"
        return dx

    def _narrow(self, product: Product, pair: Factors, like: Tensor, *, turn: bool) -> Narrow:
        """Return W, or with factors W + s·B·A, in 8 bits: (O, D), or its transpose."""
        if product.largest is not None and product.write8 is not None and pair is not None:
            scale, by = _scales(product.largest(), pair, product.scale, turn=turn)
            shape = (product.inputs, product.outputs) if turn else (product.outputs, product.inputs)
            out = like.new_empty(shape, dtype=FORMAT)
            product.write8(out.t() if turn else out, *pair, by.t() if turn else by)
            return out, scale
        W, change = self._parts(product, pair, like)
        apart = pair is None or change is not None  # W is the stored weight itself
        largest = product.largest() if apart and product.largest is not None else (W.abs().amax(1), W.abs().amax(0))
        if pair is None or change is None:
            scale = largest[turn].float().clamp(min=SMALLEST)[:, None] / LARGEST
            return (turned if turn else rounded)(W, 1 / scale), scale
        scale, by = _scales(largest, pair, product.scale, turn=turn)
        return (turned_sum if turn else rounded_sum)(W, change, product.scale, by), scale

    def _parts(self, product: Product, pair: Factors, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return W and, where it lies there as it is, B·A apart: the sum must not be rounded to W's own numbers."""
        if pair is None or product.stored is None or product.stored.dtype != like.dtype:
            return self._weight(product, pair, like), None
        A, B = (factor.to(like.dtype) for factor in pair)
        out = workspace.buffer((product.outputs, product.inputs), like.dtype, like.device)
        return product.stored, torch.mm(B, A, out=out)


def _scales(
    largest: tuple[Tensor, Tensor], pair: tuple[Tensor, Tensor], s: float, *, turn: bool
) -> tuple[Tensor, Tensor]:
    A, B = pair
    return scales(largest[1], A.t(), B.t(), s) if turn else scales(largest[0], B, A, s)
