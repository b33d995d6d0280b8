"""The maths of a change of low rank: W' = W + s·B·A. Pure functions on tensors.

Letters: W (out, in) frozen weight, A (r, in), B (out, r), x (..., in), y (..., out), s the scale.
Sources: Hu et al. 2021 (LoRA, eq. 3), Kalajdzievski 2023 (rsLoRA), Meng et al. 2024 (PiSSA, eq. 2-4),
Büyükakyüz 2024 (OLoRA), Liu et al. 2024 (DoRA, eq. 5 and section 4.3).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def scale(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """Return s: alpha/r, or alpha/sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def delta(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return s·(x Aᵀ) Bᵀ, the change of the layer's output: (..., in) -> (..., out)."""
    return F.linear(F.linear(x, A), B) * s


def delta_weight(A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return s·B·A, the change of the weight: (out, in). 16-bit factors are multiplied in fp32."""
    if A.dtype in (torch.float16, torch.bfloat16):
        A, B = A.float(), B.float()
    return (B @ A) * s


def kaiming_(A: Tensor, generator: Generator | None = None) -> Tensor:
    """Fill A as nn.Linear is filled: uniform in ±1/sqrt(in). This is LoRA's (and PEFT's) default for A."""
    return torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)


def gaussian_(A: Tensor, generator: Generator | None = None) -> Tensor:
    """Fill A with N(0, 1/r²), PEFT's "gaussian"."""
    return torch.nn.init.normal_(A, std=1 / A.shape[0], generator=generator)


def pissa(W: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
    """Return A0, B0 with s·B0·A0 = the best rank-r part of W (PiSSA: principal singular values and vectors)."""
    U, S, Vh = torch.linalg.svd(W.to(_at_least_fp32(W)), full_matrices=False)
    root = (S[:rank] / s).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def olora(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A0, B0 = the first r rows of R and columns of Q in W = QR (OLoRA)."""
    Q, R = torch.linalg.qr(W.to(_at_least_fp32(W)))
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def _at_least_fp32(W: Tensor) -> torch.dtype:
    return W.dtype if W.dtype == torch.float64 else torch.float32


def row_norm(W: Tensor) -> Tensor:
    """Return the L2 norm of each row (out,): DoRA's ||V + ΔV|| per output feature."""
    norm: Tensor = torch.linalg.vector_norm(W, dim=1)
    return norm
