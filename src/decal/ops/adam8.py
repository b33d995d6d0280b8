"""AdamW whose two moments are held in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

m is in the signed dynamic map, v in the unsigned one (ops/dynamic8.py), each in blocks of 256 with an fp32 absmax. A
step decodes them, does AdamW in fp32 and codes them again, to the nearest code, with one exception: a v above 0 never
becomes 0. The smallest value of the map is 3.25e-7 of the block's largest, so a gradient 2,500 times smaller than its
neighbours' would have v = 0 and m > 0, and move by m / eps (1e-8) as soon as its own gradient is 0 for a step, as those
of embedding rows are. Bitsandbytes has no such floor; all else is its formula.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from decal.ops import dynamic8

BLOCK = dynamic8.BLOCK


class Moments(NamedTuple):
    """Both moments of n parameters in n / 256 blocks: codes (n,) uint8 and absmax (n / 256,) fp32 of each."""

    m: Tensor
    m_absmax: Tensor
    v: Tensor
    v_absmax: Tensor


def adamw(
    p: Tensor,
    g: Tensor,
    moments: Moments,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Moments]:
    """Return the parameters and moments after step number `step` (from 1) along the gradient g.

    p, g: (n,) fp32, n a multiple of 256. Decay is decoupled (Loshchilov & Hutter 2019, algorithm 2).
    """
    m = dynamic8.dequantize(moments.m, moments.m_absmax).mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v = dynamic8.dequantize(moments.v, moments.v_absmax, signed=False).mul_(betas[1])
    v.addcmul_(g, g, value=1 - betas[1])
    scale = (v.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(eps)
    p = (p * (1 - lr * weight_decay)).addcdiv_(m, scale, value=-lr / (1 - betas[0] ** step))
    v_codes, v_absmax = dynamic8.nearest(v, signed=False)
    return p, Moments(*dynamic8.nearest(m), torch.maximum(v_codes, (v > 0).to(torch.uint8)), v_absmax)
