"""Chosen rows of an embedding trained in place of the whole table (`trainable_token_indices`): new tokens, mostly.

The parameter holds the rows themselves, (n, D), and replaces those of the table; a tied output head uses them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decal.errors import Unsupported
from decal.layers.routing import Switch


class TokenTable(nn.Module):
    """The table and each adapter's rows, under PEFT's names: `base_layer`, `trainable_tokens_delta.<adapter>`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.trainable_tokens_delta = nn.ParameterDict()
        self.indices: dict[str, tuple[int, ...]] = {}


class TokenRows(nn.Module):
    """An embedding of which some rows are replaced by trained ones."""

    def __init__(self, layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.token_adapter = TokenTable(layer)
        self.switch = switch
        self._original: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """The table as the base has it, (V, D)."""
        weight = self.token_adapter.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight(self) -> Tensor:
        return self.table

    def add(self, name: str, indices: tuple[int, ...], dtype: torch.dtype) -> None:
        """Start adapter `name`'s rows as the table's."""
        rows = self.table.detach()[list(indices)].to(dtype)
        self.token_adapter.trainable_tokens_delta[name] = nn.Parameter(rows)
        self.token_adapter.indices[name] = indices

    def remove(self, name: str) -> None:
        if name in self.token_adapter.indices:
            del self.token_adapter.trainable_tokens_delta[name]
            del self.token_adapter.indices[name]

    def trainable(self, name: str) -> list[nn.Parameter]:
        rows = self.token_adapter.trainable_tokens_delta
        return [rows[name]] if name in rows else []

    def current(self) -> list[tuple[Tensor, Tensor]]:
        """Return (indices, rows) of the active adapters, in their order."""
        if self.switch.routing is not None and not self.switch.disabled and self.token_adapter.indices:
            raise Unsupported(
                "trained token rows (trainable_token_indices) cannot be routed within a batch",
                got=sorted(self.token_adapter.indices),
                fix="Use one such adapter a batch: set_adapter(name), without adapter_names.",
            )
        return [
            (torch.tensor(self.token_adapter.indices[n], device=self.table.device), self.rows_of(n))
            for n in self.switch.on(self.token_adapter.indices)
        ]

    def rows_of(self, name: str) -> Tensor:
        rows: Tensor = self.token_adapter.trainable_tokens_delta[name]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """(..., T) -> (..., T, D)."""
        out: Tensor = self.token_adapter.base_layer(ids)
        padding: Any = self.token_adapter.base_layer.padding_idx  # the token whose row learns nothing
        factor: Any = getattr(self.token_adapter.base_layer, "embed_scale", None)
        for indices, rows in self.current():
            position = torch.full((self.table.shape[0],), -1, device=ids.device)
            position[indices] = torch.arange(len(indices), device=ids.device)
            place = position[ids]
            new = F.embedding(place.clamp(min=0), rows)
            if padding is not None:
                new = torch.where((ids == padding)[..., None], new.detach(), new)
            if factor is not None:
                new = new * factor.to(new.dtype)
            out = torch.where((place >= 0)[..., None], new.to(out.dtype), out)
        return out

    @torch.no_grad()
    def merge(self, names: tuple[str, ...]) -> None:
        """Write the rows of `names` into the table."""
        present = [name for name in names if name in self.token_adapter.indices]
        if present:
            self._original = self.table.detach().clone()
        for name in present:
            self.table[list(self.token_adapter.indices[name])] = self.rows_of(name).to(self.table.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._original is not None:
            self.table.copy_(self._original)
            self._original = None

    def forget_original(self) -> None:
        self._original = None


class TiedTokenRows(nn.Module):
    """The output head of a tied pair: its logits of the trained tokens come from the trained rows."""

    def __init__(self, head: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = head
        self._rows = (rows,)  # in a tuple: the embedding is not a part of the head

    @property
    def rows(self) -> TokenRows:
        """The embedding whose rows these are."""
        return self._rows[0]

    @property
    def weight(self) -> Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits: Tensor = self.base_layer(x)
        for indices, rows in self.rows.current():
            new = F.linear(x, rows.to(x.dtype), None if self.bias is None else self.bias[indices])
            logits = logits.index_copy(-1, indices, new.to(logits.dtype))
        return logits
