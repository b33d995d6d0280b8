"""The two seams: a Base is one frozen weight in some storage format, an Adapter is one change to it.

Law, tested for every pair: with dropout off, `delta(x, y, base) == x @ delta_weight(base).T` where
`y = base.matmul(x)`. Weights are (out, in) on both sides of the seam, whatever the layout in storage.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Base(Protocol):
    """A frozen weight, seen as (out, in)."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weight (the compute dtype is the input's)."""
        ...

    @property
    def on_output_grid(self) -> bool:
        """Whether the stored values are 16-bit numbers, so that W + s·B·A in 16 bits would round a small s·B·A away."""
        ...

    @property
    def readable(self) -> bool:
        """Whether `lent`, `dense`, `dense_plus` and `holding` work; else only the products do."""
        ...

    @property
    def overwritten(self) -> bool:
        """Whether `holding` writes into the layer itself."""
        ...

    def matmul(self, x: Tensor) -> Tensor:
        """Return x Wᵀ without the bias: (..., in) -> (..., out)."""
        ...

    def matmul_plus(self, x: Tensor, change: Tensor) -> Tensor:
        """Return x Wᵀ + change, rounded once to x's dtype: (..., in), (..., out) -> (..., out)."""
        ...

    def lent(self, dtype: torch.dtype) -> Tensor:
        """Return W (out, in) in `dtype`, perhaps in the shared buffer: valid until the next call on this stream."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W (out, in) in `dtype`; may be the stored tensor itself: do not write to it."""
        ...

    def dense_plus(self, A: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
        """Return W + s·B·A (out, in) in `dtype`, in the shared buffer: valid until the next call on this stream."""
        ...

    def holding(self, W: Tensor) -> nn.Module:
        """Return a layer that holds W (out, in): this one, overwritten; or a dense one, where the format cannot."""
        ...

    def restore(self, W: Tensor) -> None:
        """Put W (out, in) back into the layer that `holding` overwrote: the same bits."""
        ...


class Adapter(Protocol):
    """One change to a frozen weight."""

    reads_output: bool  # whether `delta` needs y

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B, s if the change is just s·B·A of the plain input right now (no dropout drawn), else None."""
        ...

    def delta(self, x: Tensor, y: Tensor | None, base: Base) -> Tensor:
        """Return what is added to the output: (..., in), (..., out) -> (..., out).

        y = base.matmul(x), without the bias; None only where `reads_output` is False.
        """
        ...

    def delta_weight(self, base: Base) -> Tensor:
        """Return what is added to the weight, (out, in), in fp32 or wider."""
        ...
