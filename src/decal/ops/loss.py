"""Cross entropy over a language model's head in chunks of rows, its gradient formed in the same pass.

loss = sum over supervised rows of  logsumexp(z) - z[label],  z = h·Wᵀ + b;   dL/dz = softmax(z) - onehot(label).
dL/dz is known as soon as z is, so dh = dz·W (and, for a head that trains, dW = dzᵀ·h) is formed before the next chunk:
the logits of one chunk are the only ones that ever exist, and backward has nothing left to do but scale. A frozen head
in codes is no more whole than the logits are: both products go through it slab by slab (ops/slabs.py).

Shapes: N rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decal.errors import DataError, Unsupported
from decal.ops import fuse, regions, select, slabs
from decal.ops.slabs import Slabs

# Rows of logits that exist at a time. CPU, SmolLM2's head (V=49152, D=576), 2048 rows, fp32, forward and both
# gradients' GEMMs, CPU seconds on one AVX2 thread: 32 rows 3.42, 64 2.87, 128 2.54, 256 2.42, 512 2.33, 1024 2.43,
# whole logits through F.cross_entropy 3.32. 256 rows hold 48 MiB of logits (whole: over 1 GiB more), 512 twice that.
CHUNK = {"cpu": 256, "cuda": 1024}


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Slabs,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    ignore: int = -100,
) -> tuple[Tensor, int]:
    """Return the summed cross entropy (a scalar, at least fp32) of the supervised rows and how many there are.

    `hidden` (N, D), `weight` (V, D), frozen where it is in slabs, `bias` (V,), `labels` (N,), `ignore` for rows outside
    the loss; they may lie on the CPU, which spares a synchronisation with the device. Gradients reach hidden, and
    weight and bias where they require them. Products run in autocast's dtype where autocast is on, else in the wider of
    the two inputs' (a head stored in bf16 under fp32 activations is computed in fp32); the softmax is never below fp32.
    `chunk` rows of logits exist at a time (None: CHUNK).
    """
    rows = torch.nonzero(labels != ignore).flatten()
    targets = labels[rows]
    check_targets(targets, weight.shape[0])
    rows, targets = rows.to(hidden.device), targets.to(hidden.device)
    return cross_entropy_of_rows(hidden, weight, rows, targets, bias=bias, chunk=chunk), rows.numel()


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise DataError if a label is outside the vocabulary."""
    bad = targets[(targets < 0) | (targets >= vocabulary)]
    if len(bad):
        raise DataError(
            f"a label lies outside the vocabulary of {vocabulary}",
            got=int(bad[0]),
            fix="Use the tokenizer that belongs to this model, or resize its embeddings.",
        )


def cross_entropy_of_rows(
    hidden: Tensor,
    weight: Tensor | Slabs,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the summed cross entropy of `targets` (R,) at different `rows` (R,) of `hidden`, all on its device.

    Where regions run (ops/fuse.py) and there is no bias, a target below 0 has no loss.
    """
    kind = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    size = chunk if chunk is not None else CHUNK.get(select.habits(hidden.device), CHUNK["cuda"])
    arguments = (hidden, weight, bias, rows, targets, size, dtype, torch.is_grad_enabled())
    loss: Tensor = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's is untyped
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | Slabs,
        bias: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        chunk: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> Tensor:
        wanted = [grad and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            W = weight.to(dtype) if isinstance(weight, Tensor) else weight
            loss, grads = _forward(hidden[rows].to(dtype), W, bias, targets, chunk, wanted)
        ctx.save_for_backward(rows, *grads)
        ctx.inputs = hidden.shape, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: without this the second derivative would silently be zero
            raise Unsupported("the chunked loss has no second derivative", fix="Use F.cross_entropy over whole logits.")
        rows, dh, dW, db = ctx.saved_tensors
        shape, dtypes = ctx.inputs
        # A 0-dim scale does not promote: each product is rounded once, to the gradient's own dtype.
        dW, db = (None if g is None else (g * scale).to(d) for g, d in zip((dW, db), dtypes[1:], strict=True))
        if dh is not None:
            dh = torch.zeros(shape, dtype=dtypes[0], device=dh.device).index_copy_(0, rows, (dh * scale).to(dtypes[0]))
        return dh, dW, db, None, None, None, None, None


def _forward(
    h_ND: Tensor, W_VD: Tensor | Slabs, b_V: Tensor | None, targets: Tensor, chunk: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the summed loss and the gradients asked for of (hidden rows, weight, bias)."""
    exact = torch.promote_types(h_ND.dtype, torch.float32)  # of the softmax and of sums over rows
    n, vocabulary = min(chunk, len(h_ND)), W_VD.shape[0]
    buffer = torch.empty(n, vocabulary, dtype=h_ND.dtype, device=h_ND.device)
    losses = torch.zeros(len(h_ND), dtype=exact, device=h_ND.device)
    dh = torch.empty_like(h_ND) if wanted[0] else None
    dW = torch.zeros(W_VD.shape, dtype=exact, device=h_ND.device) if wanted[1] else None
    db = torch.zeros(vocabulary, dtype=exact, device=h_ND.device) if wanted[2] else None
    for start in range(0, len(h_ND), chunk):
        part = slice(start, start + chunk)
        h, y = h_ND[part], targets[part, None]
        z = slabs.times_transposed(h, W_VD, buffer[: len(h)])
        if b_V is None and fuse.on(z.device):
            losses[part], dz = regions.cross_entropy_(z, targets[part]), z
        else:
            losses[part], dz = _softmax(z.to(exact) if b_V is None else z.to(exact).add_(b_V), y)
            dz = dz.to(h.dtype)
        if dh is not None:
            slabs.times(dz, W_VD, dh[part])
        if dW is not None:
            dW += dz.T @ h
        if db is not None:
            db += dz.sum(0)
    return losses.sum(), [dh, dW, db]


def _softmax(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's loss, and dL/dz written over z."""
    picked = z.gather(1, y)
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    losses = (total.log() + top - picked).flatten()
    return losses, z.div_(total).scatter_add_(1, y, torch.full_like(picked, -1.0))
