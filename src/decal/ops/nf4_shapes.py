"""The 4-bit codec on tensors without values: what its kernels allocate, and nothing computed (see planning/)."""

from __future__ import annotations

import torch
from torch import Tensor

from decal.ops import nf4, select


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, block: int, kind: str) -> None:
    """Leave `out` as it is."""


def dequantize_nested(packed: Tensor, nested: nf4.Nested, out: Tensor, block: int, kind: str) -> None:
    """Leave `out` as it is. On a CPU the scales are decoded first; a card's kernel decodes them as it goes."""
    if select.habits(packed.device) == "cpu":
        places = nested.codes.int()
        values = torch.empty_like(places, dtype=torch.float32)
        torch.empty_like(values).add_(values)


def decode_plus(
    packed: Tensor,
    scales: nf4.Scales,
    A: Tensor,
    B: Tensor,
    s: float,
    out: Tensor,
    block: int,
    kind: str,
    by: Tensor | None = None,
) -> None:
    """On a CPU, decode and then multiply; a card's kernel needs nothing beside `out`."""
    if select.habits(packed.device) != "cpu":
        return
    wide = out if out.dtype in (torch.float32, torch.float64) else torch.empty_like(out, dtype=torch.float32)
    if isinstance(scales, nf4.Nested):
        dequantize_nested(packed, scales, wide, block, kind)
    wide.addmm_(B.to(wide.dtype), A.to(wide.dtype), alpha=s)
