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
    first = tensors[0]
    start = following = first.data_ptr()
    end = _end(first)
    for tensor in tensors:
        address, size = tensor.data_ptr(), tensor.nbytes
        # Two storages may be neighbours, too, but no view reaches from one into the other.
        if address != following or address + size > end:
            found.append(_stretch(first, following - start))
            first, start, end = tensor, address, _end(tensor)
        following = address + size
    return [*found, _stretch(first, following - start)]


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
    """Return `size` bytes of memory from a tensor's first on as a flat view."""
    return first.view(-1) if size == first.nbytes else first.as_strided((size // first.itemsize,), (1,))
