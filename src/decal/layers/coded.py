"""Layers whose frozen weights are stored in codes of few bits: what all such formats share, and a linear one's Base.

The state is plain bytes, two uint8 parameters: `weight` (the codes) and `scales`. Everything else is metadata on the
module. So nothing that moves, shards or casts a model's floats can change them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decal.errors import Unsupported
from decal.layers.dense import SIXTEEN_BIT, WideLinear
from decal.ops import merged, rounding, slabs, workspace
from decal.ops.slabs import Slabs

FEW_ROWS = 32  # up to here a product may be formed without forming the weight


class Coded(nn.Module):
    """A frozen parameter in a coded format, and how many weights its bytes stand for."""

    weight: nn.Parameter
    scales: nn.Parameter
    weights: int

    def reserve(self, codes: tuple[int, ...], scales: tuple[int, ...], device: torch.device | str) -> None:
        """Make room for bytes of these shapes."""
        for name, shape in (("weight", codes), ("scales", scales)):
            empty = torch.empty(shape, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))


class CodedLinear(Coded):
    """A frozen linear layer in a coded format. `dtype` is what the weight was before, and what a dense copy has."""

    transposed = False  # whether checkpoints hold W as (in, out): GPT-2's Conv1D, some models' experts
    _largest: tuple[Tensor, Tensor] | None = None
    in_slabs = False  # whether W is never whole, but a slab of rows at a time: an output head
    row_step = 1  # rows that a slab may begin at are multiples of it

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.weights = in_features * out_features
        self.bias = bias

    def over(self, codes: Tensor, scales: Tensor) -> CodedLinear:
        """Return a layer of this format on other bytes, views included."""
        other = type(self).__new__(type(self))  # nn.Module's own ways cost more than a small expert's product
        parameters = {"weight": nn.Parameter(codes, False), "scales": nn.Parameter(scales, False)}
        other.__dict__.update(self.__dict__, _parameters=parameters, _largest=None)
        return other

    def encode(self, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return the bytes of codes and of scales for W (out, in). Raises DecalError naming the tensor."""
        raise NotImplementedError

    def decode(self, out: Tensor, first: int = 0) -> Tensor:
        """Write W's rows from `first` (a multiple of `row_step`) on into `out` (rows, in) and return it."""
        raise NotImplementedError

    def slabs(self) -> Slabs:
        """Return W in slabs of at most `slabs.ROWS` rows, or of `row_step` where that is more."""
        size = max(self.row_step, slabs.ROWS // self.row_step * self.row_step)
        return Slabs(shape=(self.out_features, self.in_features), dtype=self.dtype, rows=size, form=self.decode)

    def decode_plus(self, A: Tensor, B: Tensor, s: float, out: Tensor, by: Tensor | None = None) -> Tensor:
        """Write W + s·B·A, times `by` (ops/nf4.py) where given, into `out` (out, in), rounded once, and return it."""
        wide = rounding.room(out, by)
        self.decode(wide).addmm_(B.to(wide.dtype), A.to(wide.dtype), alpha=s)
        return rounding.into(out, wide, by)

    def largest(self) -> tuple[Tensor, Tensor]:
        """Return the largest |W| of each row (out,) and of each column (in,) in fp32. Computed once."""
        if self._largest is None or self._largest[0].device != self.weight.device:
            shape = self.out_features, self.in_features
            W = self.decode(torch.empty(shape, dtype=self.dtype, device=self.weight.device))
            self._largest = W.abs().amax(1).float(), W.abs().amax(0).float()
        return self._largest

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return x Wᵀ for a few rows (rows, in) without forming W, or None."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = CodedBase(self).matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CodedBase:
    """A view of a coded layer as a Base."""

    on_output_grid = False
    overwritten = False
    readable = True

    def __init__(self, layer: CodedLinear) -> None:
        self.layer = layer

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    def matmul(self, x: Tensor) -> Tensor:
        x = merged.as_computed(x)
        if x.numel() <= FEW_ROWS * self.in_features and not (torch.is_grad_enabled() and x.requires_grad):
            y = self.layer.multiply(x.reshape(-1, self.in_features))
            if y is not None:
                return y.view(*x.shape[:-1], self.out_features)
        if self.layer.in_slabs:
            return slabs.linear(x, self.layer.slabs())
        return merged.frozen_linear(x, self.lent)

    def matmul_plus(self, x: Tensor, change: Tensor) -> Tensor:
        return merged.frozen_linear(merged.as_computed(x), self.lent, change)

    def lent(self, dtype: torch.dtype) -> Tensor:
        return self.layer.decode(workspace.buffer((self.out_features, self.in_features), dtype, self.device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.layer.decode(torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device))

    def dense_plus(self, A: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
        out = workspace.buffer((self.out_features, self.in_features), dtype, self.device)
        return self.layer.decode_plus(A.detach(), B.detach(), s, out)

    def holding(self, W: Tensor) -> nn.Module:
        """Return a dense layer with W in the layer's former dtype: codes would round the change away unmeasured.

        It computes in the dtype of its input, as this one does.
        """
        kind = WideLinear if self.layer.dtype in SIXTEEN_BIT else nn.Linear
        dense = kind(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(W.to(self.dtype), requires_grad=False)
        dense.register_parameter("bias", self.layer.bias)
        return dense

    def restore(self, W: Tensor) -> None:
        raise Unsupported("coded weights are never overwritten", fix="Keep the layer and put it back.")


def uncounted(model: nn.Module) -> int:
    """Return how many parameters a model's codes stand for beyond the bytes that they are stored in."""
    coded = [m for m in model.modules() if isinstance(m, Coded)]
    return sum(m.weights - m.weight.numel() - m.scales.numel() for m in coded)
