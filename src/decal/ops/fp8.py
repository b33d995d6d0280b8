"""Products of frozen weights in 8-bit floats (e4m3, 4 bits of exponent and 3 of mantissa), forward and backward.

Both operands are rounded as they are multiplied, each row along the sum scaled so that its largest number becomes the
format's largest; sums are fp32, and results 16-bit. Rounding costs 2.6% of a number and 3.7% of a product's size, so
this is for who asks for it (`train.precision=fp8`). The factors' own gradients stay products of 16-bit numbers.

The change s·B·A is added to W before it is rounded, never to y after it: a 16-bit y would round a young adapter away,
every time the same way. In W it moves some entries over the edge to the next number, and over a row's sum their mean is
the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from decal.ops import workspace
from decal.ops.fuse import region
from decal.ops.products import Factors, Group, Product, Projected

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0  # of FORMAT
ALIGNED = 16  # what inputs and outputs must be multiples of (cuBLAS)
Narrow = tuple[Tensor, Tensor]  # numbers in FORMAT, (M, K); what each row is multiplied by, (M, 1) in fp32


@region
def rows(x: Tensor) -> Narrow:
    """Return x (M, K) in 8 bits."""
    return _narrow(x.float())


@region
def rows_of_sum(W: Tensor, change: Tensor, scale: float) -> Narrow:
    """Return W + scale·change, (O, D), in 8 bits."""
    return _narrow(W.float() + scale * change.float())


@region
def columns(W: Tensor) -> Narrow:
    """Return the transpose (D, O) of W (O, D) in 8 bits."""
    return _narrow(W.float().t())


@region
def columns_of_sum(W: Tensor, change: Tensor, scale: float) -> Narrow:
    """Return the transpose (D, O) of W + scale·change in 8 bits."""
    return _narrow((W.float() + scale * change.float()).t())


def _narrow(wide: Tensor) -> Narrow:
    scale = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FORMAT).contiguous(), scale


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
            W, change = self._parts(product, pair, x_ND)
            times(x, rows(W) if change is None else rows_of_sum(W, change, product.scale), x_ND.dtype, out)
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
            W, change = self._parts(product, pair, dy)
            narrow = columns(W) if change is None else columns_of_sum(W, change, product.scale)
            part = times(rows(dy), narrow, dy.dtype)
            dx = part if dx is None else dx.add_(part)
        assert dx is not None, "a group has products"
        return dx

    def _parts(self, product: Product, pair: Factors, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return W and, where it lies there as it is, B·A apart: the sum must not be rounded to W's own numbers."""
        if pair is None or product.stored is None or product.stored.dtype != like.dtype:
            return self._weight(product, pair, like), None
        A, B = (factor.to(like.dtype) for factor in pair)
        out = workspace.buffer((product.outputs, product.inputs), like.dtype, like.device)
        return product.stored, torch.mm(B, A, out=out)
