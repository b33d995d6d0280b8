"""Tensors that lie side by side in memory, seen as one.

Nothing remembers how tensors lie: it is read off their addresses each time. So any of them may be replaced, moved to
another device or freed by whoever holds it, and what still lies side by side is found again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stretches(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return flat views that hold contiguous tensors of one dtype in their order, as few as memory allows."""
    found: list[Tensor] = []
    first, size = tensors[0], 0
    following, end = first.data_ptr(), _end(first)
    for tensor in tensors:
        address = tensor.data_ptr()
        # Two storages may be neighbours, too, but no view reaches from one into the other.
        if address != following or address + tensor.nbytes > end:
            found.append(_stretch(first, size))
            first, size, end = tensor, 0, _end(tensor)
        size += tensor.numel()
        following = address + tensor.nbytes
    return [*found, _stretch(first, size)]


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of the same values; those alone in their storage are copied into a new one, in their order.

    Those that share a storage stay there: it would not be freed while any of the others lives.
    """
    alone = [i for i, tensor in enumerate(tensors) if tensor.untyped_storage().nbytes() == tensor.nbytes]
    out = list(tensors)
    if len(alone) > 1:
        together = torch.cat([tensors[i].view(-1) for i in alone])
        for i, copy in zip(alone, together.split_with_sizes([tensors[i].numel() for i in alone]), strict=True):
            out[i] = copy.view(tensors[i].shape)
    return out


def _end(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr() + storage.nbytes()


def _stretch(first: Tensor, size: int) -> Tensor:
    return first.view(-1) if size == first.numel() else first.as_strided((size,), (1,))
