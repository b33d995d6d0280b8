"""The dynamic 8-bit map (Dettmers 2015, arXiv 1511.04561): QLoRA's scales and the states of 8-bit optimizers.

256 values: 0, 1, and for each exponent e = 0..6 the 2^e midpoints of equal steps between 0.1 and 1, times 10^(e-6),
with both signs. Unsigned, for what is never negative, 2^(e+1) midpoints with one sign. Blocks of 256 values share one
fp32 absmax.

`quantize` gives the codes of bitsandbytes' CPU build, which looks a value v in [-1, 1] up in 65,536 equal bins and so
may take the neighbour of the nearest code within 1.6e-5 of a midpoint. Its CUDA build takes the nearest, as `nearest`
does; the two differ there.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
BINS = 65536
HALF = (BINS - 1) / 2
SMALLEST = 1e-38  # of an absmax to divide by: below it 1 / absmax is infinite


@cache
def table(device: torch.device, *, signed: bool = True) -> Tensor:
    """Return the 256 values in rising order, fp32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1, dtype=torch.float32)
        middles = (10 ** (exponent - 6) * ((steps[:-1] + steps[1:]) / 2)).tolist()
        values += middles + [-value for value in middles if signed]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _midpoints(device: torch.device, *, signed: bool) -> Tensor:
    values = table(torch.device("cpu"), signed=signed)
    return ((values[:-1] + values[1:]) / 2).to(device)


@cache
def _bins(device: torch.device) -> Tensor:
    """Return the code of each bin: the nearest value, the lower of two equally near."""
    centres = torch.arange(BINS, dtype=torch.float32) / HALF - 1
    return torch.bucketize(centres, _midpoints(torch.device("cpu"), signed=True)).to(device, torch.uint8)


def quantize(x: Tensor, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the codes (n,) uint8 and each block's absmax fp32 of the values x (n,)."""
    flat = x.flatten().float()
    n, blocks = len(flat), -(-len(flat) // block)
    padded = F.pad(flat, (0, blocks * block - n)).view(blocks, block)
    absmax = padded.abs().amax(1)
    unit = (padded * (1 / absmax)[:, None]).nan_to_num_(-1.0).clamp_(-1, 1)  # 0 · inf: code 0
    codes = _bins(x.device)[((unit + 1) * HALF + 0.5).long()]
    return codes.flatten()[:n].contiguous(), absmax


@cache
def _by_upper_half(device: torch.device, *, signed: bool) -> Tensor:
    """Return the lowest code of all fp32 numbers that share their upper 16 bits, for each such half (65,536,) uint8."""
    upper = torch.arange(BINS, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).nan_to_num(0.0)
    return torch.bucketize(ends, _midpoints(torch.device("cpu"), signed=signed)).amin(0).to(device, torch.uint8)


@cache
def _followed(device: torch.device, *, signed: bool) -> Tensor:
    """Return the midpoint between each code's value and the next one, infinity for the last (256,)."""
    return F.pad(_midpoints(device, signed=signed), (0, 1), value=torch.inf)


def nearest(x: Tensor, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return the nearest codes (n,) uint8, the lower of two equally near, and each block's absmax fp32 of x (n,).

    n is a multiple of 256: states are stored in whole blocks.
    """
    rows = x.view(-1, BLOCK)
    absmax = rows.abs().amax(1)
    unit = (rows * (1 / absmax.clamp_min(SMALLEST))[:, None]).flatten()
    # torch.bucketize, ten times as fast: numbers of one upper half (7 bits of mantissa) lie closer together than the
    # map's values, so the second of at most two candidates is told from the first by the midpoint between them.
    codes = _by_upper_half(x.device, signed=signed).index_select(0, (unit.view(torch.int32) >> 16) & 0xFFFF)
    above = _followed(x.device, signed=signed).index_select(0, codes.int())
    return codes.add_(unit > above), absmax


def dequantize(codes: Tensor, absmax: Tensor, *, block: int = BLOCK, signed: bool = True) -> Tensor:
    """Return the values (n,) fp32: table[code] · absmax of the block, rounded once."""
    scales = absmax.repeat_interleave(block)[: len(codes)]
    return table(codes.device, signed=signed).index_select(0, codes.int()) * scales
