"""Modules that are trained whole beside the adapters (`modules_to_save`): one copy for each adapter, one switch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from decal.errors import Unsupported
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.dense import WideLinear
from decal.layers.routing import Routing, Switch


class ReplacedModule(nn.Module):
    """The original module, and a trained copy of it for each adapter that has one."""

    def __init__(self, module: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.switch = switch

    def add(self, name: str, *, tied_to: nn.Module | None = None) -> None:
        """Copy the original for adapter `name`; with `tied_to` the copy's weight is that module's own parameter."""
        module = copy.deepcopy(_trainable(self.original_module))
        if tied_to is not None:
            module.weight = tied_to.weight
        self.modules_to_save[name] = module.requires_grad_(True)

    def remove(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def trainable(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of adapter `name`'s copy."""
        return list(self.modules_to_save[name].parameters()) if name in self.modules_to_save else []

    def current(self) -> nn.Module:
        """Return the copy of the first active adapter that has one, else the original."""
        on = () if self.switch.disabled else self.switch.merged or self.switch.active
        names = [name for name in on if name in self.modules_to_save]
        return self.modules_to_save[names[0]] if names else self.original_module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = None if self.switch.disabled else self.switch.routing
        if routing is None:
            return self.current()(x, *args, **kwargs)
        return self._routed(routing, x)

    def _routed(self, routing: Routing, x: Tensor) -> Tensor:
        """Each row through its own adapter's copy. Only whole rows: a copy replaces, it cannot be weighted."""
        names: list[str | None] = [None] * routing.rows
        for segment in routing.segments:
            if segment.adapter in self.modules_to_save:
                if segment.start or segment.stop is not None or segment.weight != 1.0 or names[segment.row]:
                    raise Unsupported(
                        f"adapter {segment.adapter!r} replaces a whole module (modules_to_save), which cannot be "
                        "routed to a part of a row or weighted",
                        fix="Give each row one adapter.",
                    )
                names[segment.row] = segment.adapter
        rows = [self.modules_to_save[n] if n else self.original_module for n in names]
        return torch.cat([module(x[i : i + 1]) for i, module in enumerate(rows)])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.current(), name)


def _trainable(module: nn.Module) -> nn.Module:
    """Return `module`, or a dense layer in the place of a coded one, whose codes cannot be trained."""
    if not isinstance(module, CodedLinear):
        return module
    dense = WideLinear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(CodedBase(module).dense(module.dtype))
    dense.register_parameter("bias", module.bias)
    return dense
