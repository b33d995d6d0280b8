"""Causal attention of samples that lie end to end in rows, so that none sees another (variable-length attention).

Shapes: B rows of S tokens, H heads of queries and fewer of keys and values, each of width E.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from decal.ops import select

EVERY = 64  # bounds come in multiples of it, so that batches with other counts of samples have one shape
SHORTEST = 128  # tokens that FlashAttention takes at a time: a shorter longest sample saves nothing
FLASH_FROM = (8, 0)  # compute capability
WIDEST = 256  # head that FlashAttention takes


@dataclass(frozen=True)
class Segments:
    """Where samples begin in B·S tokens: `bounds` int32, the first 0, the last B·S (more than once, to fill up).

    `longest` is the length of the longest sample.
    """

    bounds: Tensor
    longest: int

    @property
    def reach(self) -> int:
        """A power of two that no sample is longer than, which comes again where `longest` does not."""
        return max(SHORTEST, 1 << (self.longest - 1).bit_length())

    def to(self, device: torch.device) -> Segments:
        """Return it with its bounds on `device`."""
        return Segments(self.bounds.to(device), self.longest)


def segments(position_ids: Tensor) -> Segments:
    """Return, on the host, where positions (B, S) start again at 0. Padding is a sample, too."""
    starts = (position_ids.flatten().cpu() == 0).nonzero().flatten()
    ends = pad(starts, (0, 1), value=position_ids.numel())
    bounds = pad(ends, (0, -len(ends) % EVERY), value=position_ids.numel())
    return Segments(bounds.to(torch.int32), int(ends.diff().max()))


def attend(q: Tensor, k: Tensor, v: Tensor, where: Segments, scale: float) -> Tensor:
    """q (B, H, S, E), k and v (B, fewer, S, E) -> (B, S, H, E). `where` lies on their device."""
    if select.kind(q.device) == "shapes":  # nothing has values, and every kernel is linear in memory
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    return _flash(q, k, v, where, scale) if _takes(q) else _masked(q, k, v, where, scale)


def _takes(q: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > WIDEST:
        return False
    return torch.cuda.get_device_capability(q.device) >= FLASH_FROM


def _flash(q: Tensor, k: Tensor, v: Tensor, where: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, length, width = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    attend: Any = varlen_attn  # another signature in each release
    grouped = {"enable_gqa": True} if "enable_gqa" in _arguments(attend) else {}  # torch 2.11 sees it in the shapes
    bounds, longest = where.bounds, where.reach
    out: Tensor = attend(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped)
    return out.view(rows, length, heads, width)


@cache
def _arguments(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _masked(q: Tensor, k: Tensor, v: Tensor, where: Segments, scale: float) -> Tensor:
    rows, _, length, _ = q.shape
    tokens = torch.arange(rows * length, device=q.device)
    sample = torch.bucketize(tokens, where.bounds[1:], right=True).view(rows, 1, length)
    mask = (sample[..., :, None] == sample[..., None, :]).tril()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
