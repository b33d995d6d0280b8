"""The signed dynamic 8-bit map (Dettmers 2015, arXiv 1511.04561), in which QLoRA stores the scales of its blocks.

256 values: 0, 1, and for each exponent e = 0..6 the 2^e midpoints of equal steps between 0.1 and 1, times 10^(e-6),
with both signs. Blocks of 256 values share one fp32 absmax.

Codes are those of bitsandbytes' CPU build, which looks a value v in [-1, 1] up in 65,536 equal bins and so may take the
neighbour of the nearest code within 1.6e-5 of a midpoint. Its CUDA build takes the nearest; the two differ there.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
BINS = 65536
HALF = (BINS - 1) / 2


@cache
def table(device: torch.device) -> Tensor:
    """Return the 256 values in rising order, fp32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (10 ** (exponent - 6) * ((steps[:-1] + steps[1:]) / 2)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _bins(device: torch.device) -> Tensor:
    """Return the code of each bin: the nearest value, the lower of two equally near."""
    values = table(torch.device("cpu"))
    centres = torch.arange(BINS, dtype=torch.float32) / HALF - 1
    return torch.bucketize(centres, (values[:-1] + values[1:]) / 2).to(device, torch.uint8)


def quantize(x: Tensor, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the codes (n,) uint8 and each block's absmax fp32 of the values x (n,)."""
    flat = x.flatten().float()
    n, blocks = len(flat), -(-len(flat) // block)
    padded = torch.nn.functional.pad(flat, (0, blocks * block - n)).view(blocks, block)
    absmax = padded.abs().amax(1)
    unit = (padded * (1 / absmax)[:, None]).nan_to_num_(-1.0).clamp_(-1, 1)  # 0 · inf: code 0
    codes = _bins(x.device)[((unit + 1) * HALF + 0.5).long()]
    return codes.flatten()[:n].contiguous(), absmax


def dequantize(codes: Tensor, absmax: Tensor, *, block: int = BLOCK) -> Tensor:
    """Return the values (n,) fp32: table[code] · absmax of the block, rounded once."""
    scales = absmax.repeat_interleave(block)[: len(codes)]
    return table(codes.device)[codes.long()] * scales
