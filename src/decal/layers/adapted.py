"""AdaptedLinear: the one place where a frozen weight and its changes meet.

Three ways to the same output, chosen by what the batch needs:
1. merge on the fly: form W + s·B·A in a shared buffer and multiply once;
2. side branch: x Wᵀ + the sum of the deltas, rounded once;
3. routed: tokens of one batch belong to different adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from decal.layers.dense import DenseBase
from decal.layers.lora import LinearLoRA, LoRA
from decal.layers.routing import Column, Switch
from decal.layers.seams import Base
from decal.ops import dropout, merged, routed, select

# Way 1 rewrites W' for every product: with fewer rows than this that costs time, from here on it costs none and saves
# memory. Measured on two AVX-512 cores for layers of 576 to 2048 (benchmarks/merge_rows.py); cuda's is an estimate.
MERGE_ROWS = {"cpu": 1024, "cuda": 1024}
WIDE = (torch.float32, torch.float64)


class Original(NamedTuple):
    """What a layer stood on before a merge; `weight` is a copy if the merge wrote over it."""

    layer: nn.Module
    base: Base
    weight: Tensor | None


class Adapted(nn.Module):
    """A layer with named adapters: registers their parts under PEFT's names and keeps track of what is merged."""

    def __init__(self, layer: nn.Module, base: Base, switch: Switch) -> None:
        super().__init__()
        self.base_layer = layer
        self.base = base
        self.switch = switch
        self.adapters: dict[str, LoRA] = {}
        self._original: Original | None = None

    def add(self, name: str, adapter: LoRA) -> None:
        """Register `adapter` as `name`; its parts appear as `lora_A.<name>`, `lora_B.<name>`, ..."""
        for kind, part in adapter.slots().items():
            if not hasattr(self, kind):
                self.add_module(kind, nn.ModuleDict() if isinstance(part, nn.Module) else nn.ParameterDict())
            container = getattr(self, kind)
            container[name] = part
            if isinstance(part, nn.Module):
                part.train(self.training)
            else:
                adapter.housed(kind, container, name)
        self.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forget the adapter `name`, if it is here."""
        adapter = self.adapters.pop(name, None)
        if adapter is not None:
            for kind in adapter.slots():
                del getattr(self, kind)[name]

    def trainable(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of adapter `name` that training moves."""
        parts = [part for kind, part in self.adapters[name].slots().items() if not kind.startswith("lora_start")]
        return [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]

    # What PEFT's layers answer, too.

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def scaling(self) -> dict[str, float]:
        return {name: adapter.scale for name, adapter in self.adapters.items()}

    @property
    def r(self) -> dict[str, int]:
        return {name: adapter.rank for name, adapter in self.adapters.items()}

    @property
    def lora_alpha(self) -> dict[str, float]:
        return {name: adapter.alpha for name, adapter in self.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self.switch.active if name in self.adapters]

    @torch.no_grad()
    def merge(self, names: Sequence[str]) -> None:
        """Write W + the sum of the changes of `names` into the base layer, rounded once; keeps W for `unmerge`."""
        change = self.change(names)
        if change is None:
            return
        W = self.base.dense(change.dtype)
        kept = self.base.dense(self.base.dtype).clone() if self.base.overwritten else None
        self._original = Original(self.base_layer, self.base, kept)
        self._stand_on(self.base.holding(W + change))

    @torch.no_grad()
    def change(self, names: Sequence[str]) -> Tensor | None:
        """Return what the adapters `names` add to the weight together, (out, in) in fp32 or wider; None for nothing."""
        present = [self.adapters[name] for name in names if name in self.adapters and self.adapters[name].owns_weight]
        dtype = torch.float64 if self.base.dtype == torch.float64 else torch.float32
        parts = [adapter.delta_weight(self.base).to(dtype) for adapter in present]
        return sum(parts[1:], start=parts[0]) if parts else None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back that `merge` kept: the same bits."""
        if self._original is not None:
            self.base_layer, self.base = self._original.layer, self._original.base
            if self._original.weight is not None:
                self.base.restore(self._original.weight)
            self._original = None

    def _stand_on(self, layer: nn.Module) -> None:
        if layer is not self.base_layer:
            self.base_layer, self.base = layer, DenseBase(layer)

    def forget_original(self) -> None:
        """Give up the way back after a merge."""
        self._original = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what `adapter` adds to the weight, (out, in) in fp32 or wider."""
        return self.adapters[adapter].delta_weight(self.base)


class Stack(NamedTuple):
    """The factors of several adapters side by side, and the state of the parameters that they were made from."""

    parts: tuple[Tensor, ...]
    state: list[tuple[int, int]]
    A: Tensor
    B: Tensor
    columns: tuple[Column, ...]


class AdaptedLinear(Adapted):
    """A frozen linear layer (in any Base format) with any number of adapters."""

    def __init__(self, layer: nn.Module, base: Base, switch: Switch) -> None:
        super().__init__(layer, base, switch)
        self._stack: Stack | None = None

    def remove(self, name: str) -> None:
        super().remove(name)
        self._stack = None

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.switch.routing is not None and not (self.switch.disabled or self.switch.merged):
            return self._routed(x)
        active = [self.adapters[name] for name in self.switch.on(self.adapters)]
        if not active:
            out: Tensor = self.base_layer(x)  # the very bits of the plain model
            return out
        if len(active) == 1 and self.may_merge(x):
            factors = active[0].factors()
            if factors is not None:
                A, B, s = factors
                base = self.base
                return merged.merged_linear(x, A, B, base.bias, s, lambda a, b, t: base.dense_plus(a, b, s, t))
        if len(active) == 1 and self._in_one(active[0], x):
            one, base = active[0], self.base
            drop = one.drop(x.device)
            return dropout.beside(x, one.A, one.B, one.scale, drop, weight=base.lent, bias=base.bias)
        y = self.base.matmul(x) if any(adapter.reads_output for adapter in active) else None
        change = active[0].delta(x, y, self.base)
        for adapter in active[1:]:
            change = change + adapter.delta(x, y, self.base)
        return self._plus(x, y, change)

    def _in_one(self, adapter: LoRA, x: Tensor) -> bool:
        """Whether the product and the change of a dropped input may be one function: it makes no tensor for itself."""
        redrawn = type(adapter) is LinearLoRA and adapter.redraws and adapter.draws_dropout
        narrow = x.dtype != adapter.A.dtype and not torch.is_autocast_enabled(x.device.type)
        return redrawn and self.base.readable and not narrow

    def _plus(self, x: Tensor, y: Tensor | None, change: Tensor) -> Tensor:
        """Return x Wᵀ (y, where it is known) + change + bias, rounded once."""
        if self.base.bias is not None:
            change = change + self.base.bias
        return self.base.matmul_plus(x, change) if y is None else (y + change).to(y.dtype)

    def may_merge(self, x: Tensor) -> bool:
        """Whether forming W' is exact enough (fp32, or W off the 16-bit grid) and pays for this many rows."""
        autocast = torch.is_autocast_enabled(x.device.type)
        compute = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        exact = compute in WIDE or not self.base.on_output_grid
        return (
            exact
            and self.base.readable
            and x.numel() // x.shape[-1] >= MERGE_ROWS.get(select.habits(x.device), MERGE_ROWS["cuda"])
        )

    def _routed(self, x: Tensor) -> Tensor:
        """Way 3: the base once for all tokens, then each adapter's change on its own tokens."""
        routing = self.switch.routing
        assert routing is not None
        names = [name for name in routing.adapters if name in self.adapters]
        if not names:
            out: Tensor = self.base_layer(x)
            return out
        plain = [name for name in names if self.adapters[name].factors() is not None]
        y = self.base.matmul(x) if any(self.adapters[name].reads_output for name in names) else None
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = None if y is None else y.reshape(-1, y.shape[-1])
        change_NO: Tensor | None = None
        if plain:
            stack = self._stacked(plain)
            mask_NR = routing.mask(stack.columns, x, stack.A.dtype)
            change_NO = routed.delta(x_NI.to(stack.A.dtype), stack.A, stack.B, mask_NR)
        for name in names:
            if name not in plain:
                scales = routing.scales(name, x)
                here = scales.nonzero().flatten()
                y_here = None if y_NO is None else y_NO[here]
                part = self.adapters[name].delta(x_NI[here], y_here, self.base) * scales[here, None]
                whole = part.new_zeros(x_NI.shape[0], self.out_features).index_add(0, here, part)
                change_NO = whole if change_NO is None else change_NO + whole
        assert change_NO is not None
        return self._plus(x, y, change_NO.reshape(*x.shape[:-1], self.out_features))

    def _stacked(self, names: Sequence[str]) -> Stack:
        """Return all A stacked (sum r, in) and all B side by side (out, sum r); kept between calls in inference."""
        parts = tuple(p for name in names for p in self.adapters[name].parameters())
        if torch.is_grad_enabled() or any(p.is_inference() for p in parts):
            return self._stack_up(names, parts, [])
        state = [(p._version, p.data_ptr()) for p in parts]
        kept = self._stack
        # The parameters themselves are held and compared: an id could be that of a later one in the same place.
        if kept is None or kept.state != state or any(p is not q for p, q in zip(kept.parts, parts, strict=True)):
            self._stack = kept = self._stack_up(names, parts, state)
        return kept

    def _stack_up(self, names: Sequence[str], parts: tuple[Tensor, ...], state: list[tuple[int, int]]) -> Stack:
        found = [(name, f) for name in names if (f := self.adapters[name].factors()) is not None]
        return Stack(
            parts,
            state,
            A=torch.cat([A for _, (A, _, _) in found]),
            B=torch.cat([B for _, (_, B, _) in found], dim=1),
            columns=tuple(Column(name, A.shape[0], s) for name, (A, _, s) in found),
        )
