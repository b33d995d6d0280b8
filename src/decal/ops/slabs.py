"""Products with a frozen matrix that never exists whole: a slab of its rows at a time is formed in a reused buffer.

For an output head in codes: of V words' rows a few thousand are wide at a time.

Shapes: N rows of activations, D width, V rows of the matrix W (V, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.ops import workspace

ROWS = 8192  # of a slab: 64 MiB in 16 bits at D=4096, less than the largest other layer there takes when decoded


@dataclass(frozen=True, kw_only=True)
class Slabs:
    """A frozen W (V, D) as what can be formed of it: `form(out, first)` writes rows `first` on into out (rows, D)."""

    shape: tuple[int, int]
    dtype: torch.dtype  # that the values were stored in
    rows: int  # of a slab; the last one may have fewer
    form: Callable[[Tensor, int], Tensor]

    def parts(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield which rows, and these rows in `like`'s dtype on its device; the next ones are written over them."""
        count, width = self.shape
        for first in range(0, count, self.rows):
            last = min(first + self.rows, count)
            out = workspace.buffer((last - first, width), like.dtype, like.device)
            yield slice(first, last), self.form(out, first)


def times_transposed(x_ND: Tensor, W_VD: Tensor | Slabs, out: Tensor) -> Tensor:
    """Write x·Wᵀ into `out` (N, V) and return it."""
    if isinstance(W_VD, Tensor):
        return torch.mm(x_ND, W_VD.T, out=out)
    for rows, W in W_VD.parts(x_ND):
        torch.mm(x_ND, W.T, out=out[:, rows])
    return out


def times(y_NV: Tensor, W_VD: Tensor | Slabs, out: Tensor) -> Tensor:
    """Write y·W into `out` (N, D) and return it; the slabs' products are summed in fp32 at least, rounded once."""
    if isinstance(W_VD, Tensor):
        return torch.mm(y_NV, W_VD, out=out)
    total = torch.zeros(out.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
    for rows, W in W_VD.parts(y_NV):
        total += y_NV[:, rows] @ W
    return out.copy_(total)


class _Linear(torch.autograd.Function):
    """x·Wᵀ for any number of leading dimensions; W is formed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Slabs) -> Tensor:
        ctx.W = W
        with torch.autocast(x.device.type, enabled=False):
            y = workspace.fresh((*x.shape[:-1], W.shape[0]), x)
            times_transposed(x.flatten(0, -2), W, y.flatten(0, -2))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = workspace.fresh((*dy.shape[:-1], ctx.W.shape[1]), dy)
        times(dy.flatten(0, -2), ctx.W, dx.flatten(0, -2))
        return dx, None


def linear(x: Tensor, W: Slabs) -> Tensor:
    """Return x·Wᵀ, (..., D) -> (..., V); double backward raises."""
    y: Tensor = _Linear.apply(x, W)  # type: ignore[no-untyped-call]  # torch's Function is untyped
    return y
