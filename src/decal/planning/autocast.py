"""What torch does otherwise on a card than on a CPU, for tensors that lie on a CPU and stand for a card's.

Under CUDA's autocast some functions run in fp32 that a CPU's leaves in 16 bits: their inputs are widened, and kept so
for backward. Dropout on a card keeps a mask of one byte an element; on a CPU one of the input's own width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# Of the functions that CUDA's autocast runs in fp32 (aten/src/ATen/autocast_mode.h), what models call on activations:
# some on inputs made fp32, some on inputs as they are, with an fp32 result.
_INPUTS = ("exp", "log", "log1p", "pow", "reciprocal", "rsqrt", "logsumexp")
WIDE = {getattr(place, name) for place in (torch, Tensor) for name in _INPUTS}
WIDE |= {F.layer_norm, F.group_norm, F.softplus, Tensor.__pow__, Tensor.__rpow__}
_RESULTS = ("softmax", "log_softmax", "sum", "prod", "cumsum")
WIDE_RESULT = {getattr(place, name) for place in (torch, Tensor) for name in _RESULTS} | {F.softmax, F.log_softmax}


class AsOnACard(TorchFunctionMode):
    """Use it in a `with` block around forward and backward."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(args[0])
        if torch.is_autocast_enabled("cpu") and func in WIDE:
            args, kwargs = tree_map(_widened, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and func in WIDE_RESULT and _narrow(args[0]):
            return func(*args, **{"dtype": torch.float32, **kwargs})
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """Run backward with this mode on: torch takes a mode off while it is shown a call, and here layers run again.

        So it is called as torch.autograd.backward calls it, which would show itself to the mode, too.
        """
        ones = (torch.ones_like(loss),)
        with self:
            _engine_run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)


def _widened(x: Any) -> Any:
    return x.float() if _narrow(x) else x


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(x, p, training, inplace)
    out: Tensor = torch.native_dropout(x, p, True)[0]  # a card's fused kernel, with the mask that it keeps
    return out
