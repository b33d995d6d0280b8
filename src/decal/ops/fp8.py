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

import functools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from decal.ops import rounding, select
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
    return (wide * (1 / scale)).to(FORMAT), scale


@region
def bound(largest: Tensor, own: Tensor, other: Tensor, s: float) -> Tensor:
    """Return what no number in a row (M,) of W + s·own·other, (M, r) and (r, K), is above; `largest` (M,) bounds W's.

    Rows may be columns: then `own` is Aᵀ and `other` Bᵀ.
    """
    return largest + abs(s) * (own.float().abs() * other.float().abs().amax(1)).sum(1)


@region
def scales(top: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of rows whose numbers are at most `top` (M,), and what to multiply them by; both (M, 1)."""
    scale = top.float().clamp(min=SMALLEST)[:, None] / LARGEST
    return scale, 1 / scale


@region
def rounded_(out: Tensor, W: Tensor, by: Tensor) -> None:
    """Write W (O, D), times `by` (O, 1) or (1, D), into `out` (O, D) in 8 bits."""
    out.copy_((W.float() * by).clamp(-LARGEST, LARGEST).to(FORMAT))


@region
def rounded_sum_(out: Tensor, W: Tensor, change: Tensor, s: float, by: Tensor) -> None:
    """Write W + s·change, times `by`, into `out` in 8 bits, as above."""
    out.copy_(((W.float() + s * change.float()) * by).clamp(-LARGEST, LARGEST).to(FORMAT))


def times(x: Narrow, W: Narrow, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ, (N, O), for x (N, D) and W (O, D)."""
    # The quick sum: on Hopper's cards partial sums are kept in 22 bits, far finer than what is summed.
    return torch._scaled_mm(x[0], W[0].t(), scale_a=x[1], scale_b=W[1].t(), out_dtype=dtype, use_fast_accum=True)


@dataclass(frozen=True)
class Group8(Group):
    """Products of the same input in 8-bit floats: one product of all weights, which are merged and stacked."""

    def forward(self, x_ND: Tensor, factors: Sequence[Factors]) -> Tensor:
        """Return all products side by side, (N, all O)."""
        return self._biased(times(rows(x_ND), self._narrow(factors, x_ND.device, turn=False), x_ND.dtype))

    def added(self, x_ND: Tensor, factors: Sequence[Factors], plus_NO: Tensor) -> Tensor | None:
        """Return None: such a product starts from nothing."""
        return None

    def input_gradient(self, dy_NO: Tensor, factors: Sequence[Factors], projected: Projected | None) -> Tensor:
        """Return the gradient of x."""
        return times(rows(dy_NO), self._narrow(factors, dy_NO.device, turn=True), dy_NO.dtype)

    def _narrow(self, factors: Sequence[Factors], device: torch.device, *, turn: bool) -> Narrow:
        """Return all weights with their changes in 8 bits, one above the other (all O, D), or the transpose of that."""
        tops = [_top(product, pair, turn=turn) for product, pair in zip(self.products, factors, strict=True)]
        scale, by = scales(functools.reduce(torch.maximum, tops) if turn else torch.cat(tops))
        W = torch.empty(len(scale), sum(self.outputs) if turn else self.products[0].inputs, dtype=FORMAT, device=device)
        whole, pieces = (W.t(), [by.t()] * len(tops)) if turn else (W, torch.split(by, self.outputs))
        for product, pair, out, part in zip(
            self.products, factors, torch.split(whole, self.outputs), pieces, strict=True
        ):
            product.write(out, pair, part)
        return W, scale


def _top(product: Product, pair: Factors, *, turn: bool) -> Tensor:
    """Return what bounds each row of W, with factors of W + s·B·A; with `turn` each column."""
    largest = product.largest()[turn]
    if pair is None:
        return largest
    A, B = pair
    return bound(largest, A.t(), B.t(), product.scale) if turn else bound(largest, B, A, product.scale)
