"""The plain model that a base and its adapters add up to, made, measured and written one weight at a time.

Held at once are what is not a linear layer (embeddings, norms), the adapters, one weight, and one file being written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decal.layers.adapted import Adapted
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.coded_experts import CodedExperts
from decal.layers.streamed import StreamedLinear
from decal.model import targets
from decal.model.inject import place
from decal.model.wrapper import PeftModel

Rounded = Callable[[Tensor], Tensor]
# (W, its change, what writing does to a weight), just before the two are summed, in W's own memory
Observe = Callable[[Tensor, Tensor, Rounded], None]


def merged(model: PeftModel, *, dtype: torch.dtype | None, observe: Observe | None = None) -> Any:
    """Return base + active adapters as a plain model. `model` must not be used afterwards.

    Each weight is rounded once, to `dtype`, or for None coded as the base's codes are (what is not coded keeps its
    dtype). Coded and streamed layers sum whenever their weight is asked for. `observe` sees every change.
    """
    plain: Any = model.get_base_model()
    names = model.switch.active
    for name, module in list(targets.modules(plain)):
        adapted = isinstance(module, Adapted)
        layer = targets.original(module) if adapted else module
        if isinstance(layer, CodedLinear) and (adapted or dtype is not None):
            place(plain, name, _summed(module, layer, names, dtype, observe).train(module.training))
        elif isinstance(module, Adapted) and observe is not None:
            _show(module, module.base.dense(torch.float32), names, _rounding(dtype or module.base.dtype), observe)
        elif isinstance(module, CodedExperts) and dtype is not None:
            place(plain, name, nn.Parameter(module.dense(dtype), requires_grad=False))
    plain = model.merge_and_unload()
    return plain if dtype is None else plain.to(dtype)


def _summed(
    module: nn.Module,
    layer: CodedLinear,
    names: tuple[str, ...],
    dtype: torch.dtype | None,
    observe: Observe | None,
) -> StreamedLinear:
    form = None
    if dtype is None:
        form = layer.form if isinstance(layer, StreamedLinear) else partial(copy.deepcopy, layer)
    rounded = _rounding(dtype or layer.dtype) if form is None else partial(_coded_and_back, form=form)

    def source() -> Tensor:
        change = module.change(names) if isinstance(module, Adapted) else None
        if change is None and isinstance(layer, StreamedLinear) and layer.form is None:
            return layer.source().to(dtype or layer.dtype)
        W = CodedBase(layer).dense(torch.float32)
        if change is not None:
            if observe is not None:
                observe(W, change, rounded)
            W += change
        return W if form is not None else W.to(dtype or layer.dtype)

    new = StreamedLinear(
        layer.in_features,
        layer.out_features,
        dtype=layer.dtype if dtype is None else dtype,
        source=source,
        form=form,
        bias=layer.bias,
    )
    new.transposed = layer.transposed
    return new


def _show(module: Adapted, W: Tensor, names: tuple[str, ...], rounded: Rounded, observe: Observe) -> None:
    change = module.change(names)
    if change is not None:
        observe(W, change, rounded)


def _rounding(dtype: torch.dtype) -> Rounded:
    return lambda W: W.to(dtype)


def _coded_and_back(W: Tensor, *, form: Callable[[], CodedLinear]) -> Tensor:
    layer = StreamedLinear(W.shape[1], W.shape[0], dtype=W.dtype, source=lambda: W, form=form)
    return layer.decode(torch.empty_like(W))
