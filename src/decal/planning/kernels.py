"""What operations cost beside their outputs: the work, the bytes moved, and what a kernel takes for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CARD_ROUND = 512  # torch's CUDA allocator gives out multiples of this
FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu
FLASH_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
CAUSAL = 0.5  # half of the scores are never formed


def taken(size: int, *, card: bool) -> int:
    """Return the bytes that an allocator gives out for a storage of `size`."""
    return -(-size // CARD_ROUND) * CARD_ROUND if card else size


def size(tensor: Tensor) -> int:
    """Return a tensor's bytes, those of a view alone."""
    return tensor.numel() * tensor.element_size()


def _attention(q: Any, k: Any, v: Any) -> int:
    """Return the operations of the two products of attention, all of the scores."""
    batch, heads, length, width = q.shape
    return int(2 * batch * heads * length * k.shape[2] * (width + v.shape[3]))


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the operations of a matrix product or of attention, 2 for each multiplication; 0 for all else."""
    packet = func._overloadpacket
    if packet is FLASH_CPU:
        q, k, v, *rest = args
        causal = rest[1] if len(rest) > 1 else kwargs.get("is_causal", False)
        return int(_attention(q, k, v) * (CAUSAL if causal else 1))
    if packet is FLASH_CPU_BACKWARD:
        _, q, k, v = args[:4]
        causal = args[7] if len(args) > 7 else kwargs.get("is_causal", False)
        return int(2.5 * _attention(q, k, v) * (CAUSAL if causal else 1))  # the scores once more, and four products
    found = flop_registry.get(aten.addmm if packet is aten.addmm_ else packet)  # torch knows addmm_ by no count
    if found is None:
        return 0
    return int(found(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out))


VIEWS = ("view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "detach", "alias")


def is_view(func: Any) -> bool:
    """Whether an operation moves no data."""
    name: str = func._overloadpacket.__name__
    return name.lstrip("_") in VIEWS or name in ("_unsafe_view", "split", "chunk", "empty", "new_empty", "empty_like")


Extra = Callable[[Any], int]


def _flash_backward_on_a_card(args: Any) -> int:
    """FlashAttention 2 sums dq in fp32 over heads of a width rounded up to 32, and keeps a row sum beside it."""
    _, q, *_ = args
    batch, heads, length, width = q.shape
    rows = -(-length // 128) * 128
    return int(4 * batch * heads * rows * (-(-width // 32) * 32 + 1))


ON_A_CARD: dict[Any, Extra] = {FLASH_CPU_BACKWARD: _flash_backward_on_a_card}


def workspace(func: Any, args: Any, *, card: bool) -> int:
    """Return the bytes that an operation takes for itself while it runs."""
    extra = ON_A_CARD.get(func._overloadpacket) if card else None
    return 0 if extra is None else extra(args)
