"""Linear layers that another library quantised: adapted beside that library's own product, never decoded."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from decal.errors import Unsupported

# By the package that their class comes from. Other subclasses of nn.Linear are not here: some (torch's own, inside
# MultiheadAttention) are never called, and an adapter beside them would do nothing.
OWNERS = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "hqq", "aqlm", "eetq", "transformers.integrations")


def is_owned(layer: nn.Module) -> bool:
    """Return whether a quantisation library's linear layer is here, of a format that decal does not read."""
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    home = f"{type(layer).__module__}."
    return all(isinstance(size, int) for size in sizes) and any(home.startswith(f"{owner}.") for owner in OWNERS)


class OwnedBase:
    """A view of such a layer as a Base: its product, with the layer's bias in it, and nothing else."""

    on_output_grid = True
    overwritten = False
    readable = False
    bias = None  # in the product

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.in_features: int = layer.in_features
        self.out_features: int = layer.out_features

    def _state(self) -> Tensor:
        state: Tensor = [*self.layer.parameters(), *self.layer.buffers()][0]
        return state

    @property
    def device(self) -> torch.device:
        return self._state().device

    @property
    def dtype(self) -> torch.dtype:
        dtype = self._state().dtype
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32

    def matmul(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise Unsupported(
                "this layer's product passes no gradient back, so what is adapted before it would not learn",
                got=type(self.layer).__name__,
                fix="Train on the 16-bit checkpoint, with quantize=nf4 if memory is short.",
            )
        return y

    def matmul_plus(self, x: Tensor, change: Tensor) -> Tensor:
        y = self.matmul(x)
        return (y + change).to(y.dtype)

    def lent(self, dtype: torch.dtype) -> Tensor:
        self._refuse()

    def dense(self, dtype: torch.dtype) -> Tensor:
        self._refuse()

    def dense_plus(self, A: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
        self._refuse()

    def holding(self, W: Tensor) -> nn.Module:
        self._refuse()

    def restore(self, W: Tensor) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise Unsupported(
            "the weight of a layer that another library quantised is not read: no DoRA, PiSSA, OLoRA or merging on it",
            got=type(self.layer).__name__,
            fix="Use plain LoRA, and load the adapter on the 16-bit checkpoint to merge it.",
        )
