"""A frozen linear layer in 4 bits: NF4 or FP4, its scales plain or doubly quantised (ops/nf4.py)."""

from __future__ import annotations

from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from decal.errors import DecalError
from decal.layers.coded import Coded, CodedLinear
from decal.ops import dynamic8, nf4


class NF4Linear(CodedLinear):
    """4-bit codes, two a byte. `scales` holds the bytes of absmax fp32 (one a block), or with `double_quant` those of

    offset fp32, nested absmax fp32 (one for 256 blocks), codes uint8 (one a block), in this order.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        kind: Literal["nf4", "fp4"] = "nf4",
        block: int = 64,
        double_quant: bool = True,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype, bias=bias)
        self.kind, self.block, self.double_quant = kind, block, double_quant
        self.blocks = -(-in_features * out_features // block)
        self.super_blocks = -(-self.blocks // dynamic8.BLOCK)
        scales = 4 + 4 * self.super_blocks + self.blocks if double_quant else 4 * self.blocks
        span = block * (dynamic8.BLOCK if double_quant else 1)  # weights whose scales are decoded together
        self.row_step = span // gcd(span, in_features)
        self.reserve((-(-in_features * out_features // 2),), (scales,), device)

    def encode(self, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
        packed, absmax = nf4.quantize(W, self.block, self.kind, name=name)
        return packed, scale_bytes(nf4.Nested(*nf4.double_quantize(absmax)) if self.double_quant else absmax)

    def unpacked_scales(self) -> nf4.Scales:
        """Return the scales as the codec takes them: views of the bytes."""
        if not self.double_quant:
            return self.scales.detach().view(torch.float32)
        split = 4 + 4 * self.super_blocks
        floats = self.scales.detach()[:split].view(torch.float32)
        return nf4.Nested(codes=self.scales.detach()[split:], absmax=floats[1:], offset=floats[0])

    def decode(self, out: Tensor, first: int = 0) -> Tensor:
        start = first * self.in_features
        stop = start + out.numel()
        scales = nf4.of_blocks(self.unpacked_scales(), start // self.block, -(-stop // self.block))
        codes = self.weight.detach()[start // 2 : -(-stop // 2)]
        return nf4.decode(codes, scales, out, block=self.block, kind=self.kind)

    def decode_plus(self, A: Tensor, B: Tensor, s: float, out: Tensor, by: Tensor | None = None) -> Tensor:
        scales = self.unpacked_scales()
        return nf4.decode_plus(self.weight.detach(), scales, A, B, s, out, block=self.block, kind=self.kind, by=by)

    def multiply(self, x: Tensor) -> Tensor | None:
        codes, scales = self.weight.detach(), self.unpacked_scales()
        return nf4.multiply(x, codes, scales, self.out_features, block=self.block, kind=self.kind)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}, block={self.block}, double_quant={self.double_quant}"


def scale_bytes(scales: nf4.Scales) -> Tensor:
    """Return the scales as NF4Linear stores them, (bytes,) uint8."""
    if not isinstance(scales, nf4.Nested):
        return scales.contiguous().view(torch.uint8)
    floats = torch.cat([scales.offset.float().reshape(1), scales.absmax.float().flatten()])
    return torch.cat([floats.view(torch.uint8), scales.codes.flatten()])


def check_bytes(layer: Coded, codes: Tensor, scales: Tensor, name: str) -> None:
    """Raise DecalError if the bytes are not as many as the layer holds."""
    wanted, got = (layer.weight.numel(), layer.scales.numel()), (codes.numel(), scales.numel())
    if wanted != got:
        raise DecalError(
            f"the quantised weight {name!r} is truncated or of another layout",
            got=f"{got[0]} bytes of codes and {got[1]} of scales",
            fix=f"{wanted[0]} and {wanted[1]} were expected; download or quantise the checkpoint again.",
        )
