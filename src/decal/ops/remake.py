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

from decal.ops import fuse, regions, workspace


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
        if fuse.on(gate.device):
            return regions.gated(gate, up, self.activation)
        return self._act(gate).mul_(up)

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = inputs
        if fuse.on(gate.device):
            return regions.gated_backward(dy, gate, up, self.activation)
        d_up = self._act(gate).mul_(dy)
        d = torch.mul(dy, up, out=workspace.fresh(up.shape, up))
        if self.activation == "silu":
            return torch.ops.aten.silu_backward.grad_input(d, gate, grad_input=d), d_up
        return torch.ops.aten.gelu_backward.grad_input(d, gate, approximate="tanh", grad_input=d), d_up

    def _act(self, gate: Tensor) -> Tensor:
        out = workspace.fresh(gate.shape, gate)
        if self.activation == "silu":
            torch.ops.aten.silu.out(gate, out=out)
        else:
            torch.ops.aten.gelu.out(gate, approximate="tanh", out=out)
        return out


@dataclass(frozen=True)
class RMSNorm:
    """w ∘ x / sqrt(mean(x²) + eps) over the last dimension, w frozen (Zhang & Sennrich 2019, eq. 4).

    Computed in fp32 at least and rounded to x's dtype before the weight, as transformers does.
    """

    eps: float

    def forward(self, *inputs: Tensor) -> Tensor:
        x, w = inputs
        if fuse.on(x.device):
            return regions.rms_norm(x, w, self.eps)
        wide = x.float()
        normed = torch.mul(wide, self._rstd(wide), out=workspace.fresh(x.shape, wide))
        return normed.mul_(w) if w.dtype == x.dtype == wide.dtype else w * normed.to(x.dtype)

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        x, w = inputs
        if fuse.on(x.device):
            return regions.rms_norm_backward(dy, x, w, self.eps), None
        wide = x.float()
        rstd = self._rstd(wide)
        d = torch.mul(dy, w, out=workspace.fresh(x.shape, dy)).float()  # the gradient of the normed values n
        n = torch.mul(wide, rstd, out=_scratch(wide))
        mean = n.mul_(d).mean(-1, keepdim=True)  # dx = rstd ∘ (d - n·mean(n ∘ d))
        return d.addcmul_(wide, mean.mul_(rstd), value=-1).mul_(rstd).to(x.dtype), None

    def _rstd(self, wide: Tensor) -> Tensor:
        return torch.mul(wide, wide, out=_scratch(wide)).mean(-1, keepdim=True).add_(self.eps).rsqrt_()


def _scratch(like: Tensor) -> Tensor:
    return workspace.buffer(like.shape, like.dtype, like.device)
