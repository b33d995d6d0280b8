"""Rounding to a narrower format whose largest number is an ordinary one."""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {torch.float8_e4m3fn: 448.0}  # the largest number of formats that know no infinity
EXACT = (torch.float32, torch.float64)


def room(out: Tensor, by: Tensor | None) -> Tensor:
    """Return where a sum is formed that `into` rounds: `out` itself where that is as exact."""
    if out.dtype in EXACT and by is None:
        return out
    return torch.empty(out.shape, dtype=torch.float32, device=out.device)


def into(out: Tensor, wide: Tensor, by: Tensor | None) -> Tensor:
    """Write `wide` of `room`, times `by` where given and kept to what the format holds, into `out`; return `out`."""
    if wide is out:
        return out
    if by is not None:
        wide.mul_(by)
    bound = BOUNDS.get(out.dtype)
    return out.copy_(wide if bound is None else wide.clamp_(-bound, bound))
