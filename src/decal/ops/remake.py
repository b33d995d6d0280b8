"""Activations that are made again in backward, from what is kept anyway, in place of being kept themselves.

`y = made(f, a, b)` runs f without autograd's own bookkeeping and remembers on y how it came about. An operation that
would save y for its backward pass (the adapter's gradient needs the layer's input) may save a and b, which f's own
backward keeps already, and make y again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Cheap(Protocol):
    """An elementwise operation with a backward pass of its own, which needs nothing but the inputs."""

    def forward(self, *inputs: Tensor) -> Tensor: ...
    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]: ...


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again."""

    operation: Cheap
    inputs: tuple[Tensor, ...]


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Cheap, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.operation = operation
        return operation.forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.operation.backward(dy, *ctx.saved_tensors)


def made(operation: Cheap, *inputs: Tensor) -> Tensor:
    """Return operation(inputs), which knows its recipe."""
    out: Tensor = _Made.apply(operation, *inputs)  # type: ignore[no-untyped-call]  # torch's Function is untyped
    out.recipe = Recipe(operation, inputs)  # type: ignore[attr-defined]  # a note on the tensor, gone with it
    return out


def recipe(x: Tensor) -> Recipe | None:
    """Return how x was made, if it says."""
    return getattr(x, "recipe", None)


@dataclass(frozen=True)
class GatedProduct:
    """act(gate) ∘ up, the inner activation of a gated MLP (Shazeer 2020); shapes all (..., F)."""

    activation: str  # "silu" or "gelu_pytorch_tanh"

    def forward(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        return self._act(gate) * up

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = inputs
        d_act = dy * up
        if self.activation == "silu":
            d_gate = torch.ops.aten.silu_backward(d_act, gate)
        else:
            d_gate = torch.ops.aten.gelu_backward(d_act, gate, approximate="tanh")
        return d_gate, dy * self._act(gate)

    def _act(self, gate: Tensor) -> Tensor:
        return F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")


@dataclass(frozen=True)
class RMSNorm:
    """w ∘ x / sqrt(mean(x²) + eps) over the last dimension, w frozen (Zhang & Sennrich 2019, eq. 4).

    Computed in fp32 at least and rounded to x's dtype before the weight, as transformers does.
    """

    eps: float

    def forward(self, *inputs: Tensor) -> Tensor:
        x, w = inputs
        wide = x.float()
        return w * (wide * self._rstd(wide)).to(x.dtype)

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        x, w = inputs
        wide = x.float()
        rstd = self._rstd(wide)
        normed, d_normed = wide * rstd, (dy * w).float()
        mean = (d_normed * normed).mean(-1, keepdim=True)
        return ((d_normed - normed * mean) * rstd).to(x.dtype), None

    def _rstd(self, wide: Tensor) -> Tensor:
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
