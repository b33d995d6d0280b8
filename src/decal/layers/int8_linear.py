"""A frozen linear layer in 8 bits (ops/int8.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decal.layers.coded import CodedLinear
from decal.ops import int8


class Int8Linear(CodedLinear):
    """Codes int8 (out, in) and absmax fp32 (out,), both as bytes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype, bias=bias)
        self.reserve((in_features * out_features,), (4 * out_features,), device)

    def encode(self, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
        codes, absmax = int8.quantize(W, name=name)
        return codes.flatten().view(torch.uint8), absmax.view(torch.uint8)

    def decode(self, out: Tensor, first: int = 0) -> Tensor:
        codes = self.weight.detach().view(torch.int8).view(self.out_features, self.in_features)
        rows = slice(first, first + len(out))
        return int8.dequantize(codes[rows], self.scales.detach().view(torch.float32)[rows], out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"
