"""An embedding whose table lies in pinned host memory during training: only the rows of a batch go to the card."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """Stands in for a frozen nn.Embedding, with its very parameter, until `back`. The rows are the same bits."""

    def __init__(self, original: nn.Embedding) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple: not a part of this module
        self.device = original.weight.device
        table = original.weight.detach().cpu()
        original.weight.data = table.pin_memory() if self.device.type == "cuda" else table
        self.weight = original.weight

    @property
    def original(self) -> nn.Embedding:
        return self._original[0]

    def back(self) -> nn.Embedding:
        """Return the original with its table where it was."""
        self.original.weight.data = self.original.weight.detach().to(self.device)
        return self.original

    def forward(self, ids: Tensor) -> Tensor:
        """(...) on any device -> (..., D) on the device that the table was on."""
        return self.rows(ids).to(self.device, non_blocking=True)

    def rows(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D) in pinned host memory."""
        shape = (*ids.shape, self.weight.shape[1])
        out = torch.empty(shape, dtype=self.weight.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(self.weight, 0, ids.flatten().cpu(), out=out.view(-1, shape[-1]))
        return out


def host_of(module: nn.Module, head: nn.Module | None) -> HostEmbedding | None:
    """Return the form of a plain frozen embedding on the host, else None; a table that is also the head's stays."""
    if type(module) is not nn.Embedding or module.weight.requires_grad or module.max_norm is not None:
        return None
    return None if getattr(head, "weight", None) is module.weight else HostEmbedding(module)
