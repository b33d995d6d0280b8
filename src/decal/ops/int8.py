"""Weights in 8 bits: each row divided by its absmax and rounded to the nearest of 255 integers (LLM.int8(),
Dettmers et al. 2022, section 2.1). 8 bits per weight and 32 per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.errors import DecalError
from decal.ops import select

STEPS = 127
ROWS = 8192  # that are in fp32 at a time


def quantize(W: Tensor, *, name: str = "the tensor") -> tuple[Tensor, Tensor]:
    """Return the codes (out, in) int8 and the absmax of each row (out,) fp32. Raises DecalError for Inf or NaN."""
    absmax = W.abs().amax(1).float()
    if not bool(torch.isfinite(absmax).all()):
        raise DecalError(f"{name} holds Inf or NaN", fix="Repair or download the checkpoint again.")
    steps = torch.where(absmax > 0, STEPS / absmax, 0.0)
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    for first in range(0, len(W), ROWS):
        part = slice(first, first + ROWS)
        codes[part] = (W[part].float() * steps[part, None]).round_().clamp_(-STEPS, STEPS)
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """Write code · (absmax / 127) into `out` (out, in), rounded once, and return it."""
    steps = (absmax / STEPS)[:, None]
    if out.dtype == torch.float32 or select.habits(out.device) == "cuda":  # a card multiplies in fp32 without a copy
        return out.copy_(codes).mul_(steps)
    return out.copy_(codes.float().mul_(steps))
