"""The elementwise parts of a decoder layer and its loss, forward and backward, each one kernel on a card (ops/fuse.py).

Shapes: N rows, D model width, F inner width of the MLP; B rows of a batch, S positions, H heads, E head width.
Functions whose names end in _ write their results over their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from decal.ops.fuse import region


@region
def rms_norm(x: Tensor, w: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Return w ∘ x / sqrt(mean(x²) + eps) over the last dimension (Zhang & Sennrich 2019, eq. 4).

    With `gemma` (here and below) it is 1 + w, multiplied before rounding, not after.
    """
    return _rms_norm(x, w, eps, gemma)


@region
def add_rms_norm(y: Tensor, x: Tensor, w: Tensor, eps: float, gemma: bool = False) -> tuple[Tensor, Tensor]:
    """Return x + y and its norm."""
    total = x + y
    return total, _rms_norm(total, w, eps, gemma)


@region
def plus_rms_norm(y: Tensor, x: Tensor, w: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Return x + the norm of y."""
    return x + _rms_norm(y, w, eps, gemma)


def _rms_norm(x: Tensor, w: Tensor, eps: float, gemma: bool) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + w.float())).to(x.dtype) if gemma else w * normed.to(x.dtype)


@region
def rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Return the gradient of x."""
    return _rms_norm_backward(dy, x, w, eps, gemma).to(x.dtype)


@region
def rms_norm_backward_plus(dy: Tensor, x: Tensor, w: Tensor, eps: float, plus: Tensor, gemma: bool = False) -> Tensor:
    """Return the gradient of x, and `plus` (what reaches x past the norm) added to it."""
    return (_rms_norm_backward(dy, x, w, eps, gemma) + plus).to(x.dtype)


def _rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, eps: float, gemma: bool) -> Tensor:
    wide = x.float()
    rstd = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    d = dy.float() * (1.0 + w.float()) if gemma else (dy * w).float()
    n = wide * rstd
    return (d - n * (n * d).mean(-1, keepdim=True)) * rstd


@region
def norm_heads(x: Tensor, wq: Tensor, wk: Tensor, eps: float, heads: int, gemma: bool = False) -> Tensor:
    """Return x (N, H, E) with its first `heads` heads, queries, normed by wq, the next ones, keys, by wk (Qwen3).

    As many heads of values as of keys come last, and stay as they are.
    """
    q, k, v = torch.split(x, _thirds(x, heads), 1)
    return torch.cat((_rms_norm(q, wq, eps, gemma), _rms_norm(k, wk, eps, gemma), v), 1)


@region
def norm_heads_backward(
    d: Tensor, x: Tensor, wq: Tensor, wk: Tensor, eps: float, heads: int, gemma: bool = False
) -> Tensor:
    """Return the gradient of x."""
    dq, dk, dv = torch.split(d, _thirds(d, heads), 1)
    q, k, _ = torch.split(x, _thirds(x, heads), 1)
    dq, dk = _rms_norm_backward(dq, q, wq, eps, gemma), _rms_norm_backward(dk, k, wk, eps, gemma)
    return torch.cat((dq.to(x.dtype), dk.to(x.dtype), dv), 1)


def _thirds(x: Tensor, heads: int) -> list[int]:
    kv = (x.shape[1] - heads) // 2
    return [heads, kv, kv]


@region
def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return x (B, S, H, E) with its first `heads` heads turned by RoPE (Su et al. 2021, eq. 34), halves as pairs."""
    pair, c, s, first = _halves(x, cos, sin)
    a, b = pair[..., :1, :], pair[..., 1:, :]
    turned = pair * c + torch.where(first, -b, a) * s
    live = torch.arange(x.shape[2], device=x.device)[:, None, None] < heads
    return torch.where(live, turned, pair).view(x.shape)


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of `rotate`'s x, (B, S, H, E), from those of queries, keys and values, each (B, H, S, E)."""
    dq, dk, dv = (d.transpose(1, 2) for d in (dq, dk, dv))
    heads = [d.shape[2] for d in (dq, dk, dv)]
    whole = dq.new_empty(*dq.shape[:2], sum(heads), dq.shape[3])
    queries, keys, values = torch.split(whole, heads, 2)
    turn_back_into_(queries, dq, cos, sin)  # one by one: as one kernel they took three times as long
    turn_back_into_(keys, dk, cos, sin)
    values.copy_(dv)
    return whole


@region
def turn_back_into_(out: Tensor, d: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write into `out` the gradient of what `rotate` turned, (B, S, H, E) both."""
    pair, c, s, first = _halves(d, cos, sin)
    a, b = pair[..., :1, :] * s[..., :1, :], pair[..., 1:, :] * s[..., 1:, :]
    out.copy_((pair * c + torch.where(first, b, -a)).flatten(-2))


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, cos and sin with a head's two halves as an axis of its own, and where the first half is."""
    half = x.shape[-1] // 2
    c, s = (t.reshape(*t.shape[:2], 1, 2, half) for t in (cos, sin))
    return x.reshape(*x.shape[:-1], 2, half), c, s, torch.arange(2, device=x.device)[:, None] == 0


@region
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) ∘ up (Shazeer 2020); `activation` is "silu" or "gelu_pytorch_tanh"."""
    act = F.silu(_wide(gate)) if activation == "silu" else F.gelu(_wide(gate), approximate="tanh")
    return (act * up).to(gate.dtype)


@region
def gated_backward_(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Write act(gate) ∘ up over dy, and the gradients of gate and up over these."""
    act, slope = _activation(_wide(gate), activation)
    # All three before an input is overwritten.
    h, d_gate, d_up = act * up, _wide(dy) * up * slope, dy * act
    dy.copy_(h)
    gate.copy_(d_gate)
    up.copy_(d_up)


@region
def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    act, slope = _activation(_wide(gate), activation)
    return (_wide(dy) * up * slope).to(gate.dtype), (dy * act).to(up.dtype)


def _activation(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return act(g) and its derivative."""
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    root = 0.7978845608028654  # sqrt(2/π); gelu's tanh form (Hendrycks & Gimpel 2016)
    t = torch.tanh(root * (g + 0.044715 * g * g * g))
    return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * root * (1 + 3 * 0.044715 * g * g)


@region
def cross_entropy_(z: Tensor, y: Tensor) -> Tensor:
    """Return each row's loss for logits z (N, V) and labels y (N,), and write its gradient, softmax - onehot, over z.

    A row with a label below 0 has neither.
    """
    wide = _wide(z)
    top = wide.amax(1, keepdim=True)
    lse = (wide - top).exp().sum(1, keepdim=True).log() + top
    live = y >= 0
    losses = torch.where(live, lse.flatten() - wide.gather(1, y.clamp(min=0)[:, None]).flatten(), 0.0)
    onehot = torch.arange(z.shape[1], device=z.device) == y[:, None]
    z.copy_(torch.where(live[:, None], (wide - lse).exp() - onehot.to(wide.dtype), 0.0))
    return losses


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
