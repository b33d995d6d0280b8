"""Biases trained beside an adapter (`bias="all"`, `"lora_only"`): one copy per adapter, put in place by the switch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from decal.errors import Unsupported
from decal.layers.adapted import Adapted
from decal.spec import LoraConfig


class TrainedBiases:
    """The base's own biases and each adapter's. The live copy is the model's parameter itself, so optimizers see it."""

    def __init__(self) -> None:
        self._originals: dict[nn.Parameter, Tensor] = {}
        self._copies: dict[str, dict[nn.Parameter, Tensor]] = {}
        self._live: str | None = None

    def add(self, model: nn.Module, config: LoraConfig, name: str) -> None:
        """Start adapter `name`'s biases as the base's."""
        if config.bias == "none":
            return
        chosen: list[nn.Parameter] = []
        if config.bias == "all":
            chosen = [p for n, p in model.named_parameters() if n.endswith("bias") and "lora_" not in n]
        else:
            layers = [m.base_layer for m in model.modules() if isinstance(m, Adapted) and name in m.adapters]
            chosen = [b for layer in layers if isinstance(b := getattr(layer, "bias", None), nn.Parameter)]
        for p in chosen:
            self._originals.setdefault(p, p.detach().clone())
        self._copies[name] = {p: self._originals[p].clone() for p in chosen}

    def has(self, name: str) -> bool:
        return bool(self._copies.get(name))

    def remove(self, name: str) -> None:
        if self._live == name:
            self.use(())
        self._copies.pop(name, None)

    def trainable(self, name: str) -> list[nn.Parameter]:
        return list(self._copies.get(name, ()))

    @torch.no_grad()
    def use(self, names: Sequence[str]) -> None:
        """Put the biases that one of `names` trained into the model, else the base's. Raises Unsupported for two."""
        trained = [name for name in names if self.has(name)]
        if len(trained) > 1:
            raise Unsupported(f"adapters {trained} each train the base's biases", fix="Activate one of them.")
        name = trained[0] if trained else None
        if name == self._live:
            return
        if self._live in self._copies:
            live = self._copies[self._live]
            live.update({p: p.detach().clone() for p in live})
        for p, value in self._originals.items():
            p.copy_(self._copies.get(name or "", {}).get(p, value))
        self._live = name

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Use the base's own biases inside the block."""
        live = self._live
        self.use(())
        try:
            yield
        finally:
            self.use(() if live is None else (live,))

    def values(self, name: str) -> dict[nn.Parameter, Tensor]:
        """Return adapter `name`'s values by the parameter that they belong to."""
        copies = self._copies.get(name, {})
        return {p: (p.detach() if self._live == name else value) for p, value in copies.items()}

    def load(self, name: str, values: dict[nn.Parameter, Tensor]) -> None:
        """Set adapter `name`'s values."""
        self._copies[name] = {p: value.to(p.dtype) for p, value in values.items()}
        if self._live == name:
            with torch.no_grad():
                for p, value in values.items():
                    p.copy_(value)
