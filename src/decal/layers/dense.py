"""Frozen weights stored as they are: torch's Linear, and GPT-2's Conv1D, which stores the transpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from decal.ops import merged, workspace

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class DenseBase:
    """A view of an nn.Linear as a Base; the Linear keeps the parameters."""

    overwritten = True
    readable = True

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self._largest: tuple[object, tuple[Tensor, Tensor]] | None = None

    @property
    def weight(self) -> Tensor:
        """W (out, in), the stored values."""
        weight: Tensor = self.layer.weight
        return weight

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        return bias

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def on_output_grid(self) -> bool:
        return self.dtype in SIXTEEN_BIT

    def largest(self) -> tuple[Tensor, Tensor]:
        """Return the largest |W| of each row and of each column in fp32; looked for again if the weight has changed."""
        state = self.weight.data_ptr(), self.weight._version
        if self._largest is None or self._largest[0] != state:
            W = self.weight.detach().abs()
            self._largest = state, (W.amax(1).float(), W.amax(0).float())
        return self._largest[1]

    def matmul(self, x: Tensor) -> Tensor:
        if x.dtype == self.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight)
        return merged.frozen_linear(x, self.lent)

    def matmul_plus(self, x: Tensor, change: Tensor) -> Tensor:
        if x.dtype == self.dtype or torch.is_autocast_enabled(x.device.type):
            # The product's sum starts from the change. On a 16-bit y, a change below half a step of y's grid is lost:
            # at |B| = 1e-4 four fifths of a young adapter's contribution.
            y = torch.addmm(change.flatten(0, -2).to(x.dtype), x.flatten(0, -2), self.weight.T)
            return y.view(change.shape)
        return merged.frozen_linear(x, self.lent, change)

    def lent(self, dtype: torch.dtype) -> Tensor:
        W = self.weight.detach()
        return W if W.dtype == dtype else workspace.buffer(tuple(W.shape), dtype, W.device).copy_(W)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype)

    def dense_plus(self, A: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
        W = self.weight.detach()
        out = workspace.buffer(tuple(W.shape), dtype, W.device)
        A, B = A.detach().to(dtype), B.detach().to(dtype)
        if W.dtype == dtype:
            return torch.addmm(W, B, A, alpha=s, out=out)
        return out.copy_(W).addmm_(B, A, alpha=s)

    def holding(self, W: Tensor) -> nn.Module:
        self.restore(W)
        layer: nn.Module = self.layer
        return layer

    def restore(self, W: Tensor) -> None:
        self.weight.data.copy_(W)
        self._largest = None


class Conv1DBase(DenseBase):
    """A view of transformers' Conv1D (GPT-2), which stores W transposed, (in, out)."""

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layer.weight
        return weight.T


# A model whose 16-bit weights are used in fp32: same parameters, widened where they are used and never kept.


class WideLinear(nn.Linear):
    """An nn.Linear with a 16-bit weight that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = DenseBase(self).matmul(x)
        return y if self.bias is None else y + self.bias


class WideConv1D(Conv1D):  # type: ignore[misc]  # transformers has no types
    """A Conv1D with a 16-bit weight that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.bias
        return Conv1DBase(self).matmul(x) + bias


class WideEmbedding(nn.Embedding):
    """An nn.Embedding with a 16-bit table that gives fp32 rows."""

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = super().forward(ids)
        return rows.float()


WIDE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: WideLinear,
    nn.Embedding: WideEmbedding,
    Conv1D: WideConv1D,
}


def widened(module: nn.Module) -> nn.Module | None:
    """Return the layer of WIDE that has all that a 16-bit `module` has, its parameters themselves; None for others."""
    wide = WIDE.get(type(module))
    weight = getattr(module, "weight", None)
    if wide is None or not isinstance(weight, Tensor) or weight.dtype not in SIXTEEN_BIT:
        return None
    new = wide.__new__(wide)
    new.__dict__.update(module.__dict__)
    return new
