"""What torch does otherwise on a card than on a CPU, for tensors that lie on a CPU and stand for a card's.

Under CUDA's autocast some functions run in fp32 that a CPU's leaves in 16 bits: their inputs are widened and kept so
for backward. Dropout on a card keeps a mask of one byte an element; on a CPU one of the input's own width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# Of CUDA autocast's list for fp32, those that models call on activations; norms of squares widen by themselves.
WIDE = {F.layer_norm, torch.pow, Tensor.pow, Tensor.__pow__, torch.softmax, Tensor.softmax, F.softmax}


class AsOnACard(TorchFunctionMode):
    """Use it in a `with` block."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(x, p, training, inplace)
    out: Tensor = torch.native_dropout(x, p, True)[0]  # a card's fused kernel, and the mask that it keeps
    return out
