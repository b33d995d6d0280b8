"""Which tokens of a batch use which adapter, and the switch that all adapted layers of one model share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from decal.errors import AdapterError, DecalError

BASE = "__base__"  # PEFT's name for "no adapter" in `adapter_names`


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens [start, stop) of one row of the batch that use one adapter; stop None means to the end of the row."""

    row: int
    adapter: str
    start: int = 0
    stop: int | None = None
    weight: float = 1.0


class Column(NamedTuple):
    """One adapter's place in a stack of factors: its rank and its scale s."""

    adapter: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Routing:
    """The segments of one batch of `rows` rows. Tokens under no segment use the base alone."""

    rows: int
    segments: tuple[Segment, ...]
    _scales: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )
    _masks: dict[tuple[tuple[Column, ...], int, torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )
    _lengths: dict[int, int] = field(default_factory=dict, repr=False, compare=False)  # {0: tokens a row}, once seen

    @classmethod
    def by_row(cls, names: Sequence[str], *, rows: int | None = None) -> Routing:
        """Return the routing of PEFT's `adapter_names`: one adapter, or "__base__", for each row.

        Raises AdapterError for what is no list of names, and for another number of them than `rows` (None: unknown).
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names) or (rows != 0 and not names):
            raise AdapterError(
                f'adapter_names must be a list of names, one for each row of the batch ("{BASE}" for the base alone)',
                got=repr(names),
                fix="To use one adapter for all rows call set_adapter(name), and leave adapter_names out.",
            )
        if rows is not None and len(names) != rows:
            raise AdapterError(
                "adapter_names must hold one name for each row of the batch",
                got=f"names: {len(names)}, rows: {rows}",
                fix=f'Name the adapter of each row; "{BASE}" is the base alone.',
            )
        segments = (Segment(row=row, adapter=name) for row, name in enumerate(names) if name != BASE)
        return cls(len(names), tuple(segments))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters in use, each once, in order of first use."""
        return tuple(dict.fromkeys(segment.adapter for segment in self.segments))

    def expand(self, copies: int) -> Routing:
        """Return the routing of a batch in which each row stands `copies` times in a row (beams, several returns)."""
        repeated = (
            Segment(row=s.row * copies + i, adapter=s.adapter, start=s.start, stop=s.stop, weight=s.weight)
            for s in self.segments
            for i in range(copies)
        )
        return Routing(self.rows * copies, tuple(repeated))

    def scales(self, adapter: str, x: Tensor) -> Tensor:
        """Return the weight of `adapter` for each token of x, (rows * T,); x is (rows, T, ...).

        Raises DecalError for a shape whose tokens cannot be told apart (experts that see a shuffled part of them).
        """
        if x.dim() < 2 or x.shape[0] != self.rows:
            raise DecalError(
                f"a layer saw {tuple(x.shape)}, which the routing of {self.rows} rows does not cover",
                fix="Route each row of the batch. Layers that mix rows (experts, pooled inputs) cannot be routed: use "
                "one adapter a batch there.",
            )
        length = x.shape[1] if x.dim() > 2 else 1
        if any(s.start or s.stop is not None for s in self.segments) and length != self._lengths.setdefault(0, length):
            raise DecalError(
                f"a layer saw {length} tokens a row where others saw {self._lengths[0]}: segments of tokens cannot be "
                "told apart there",
                fix="Route whole rows; or run without a cache and with logits_to_keep=0, with one Routing a batch.",
            )
        key = (adapter, length, x.device, x.dtype)
        if key not in self._scales:
            scales = torch.zeros(self.rows, length, dtype=x.dtype)
            for s in self.segments:
                if s.adapter == adapter:
                    if s.stop is not None and s.stop > length:
                        raise DecalError(
                            f"a segment ends at token {s.stop} of a row of {length}",
                            fix="Segments with an end route one forward pass over whole rows.",
                        )
                    scales[s.row, s.start : s.stop] += s.weight
            self._scales[key] = scales.flatten().to(x.device)
        return self._scales[key]

    def mask(self, columns: tuple[Column, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return each token's factor for each row of the stacked factors, (rows * T, sum of ranks).

        Raises DecalError as `scales` does.
        """
        length = x.shape[1] if x.dim() > 2 else 1
        key = (columns, length, x.device, dtype)
        if key not in self._masks:
            parts = [(self.scales(c.adapter, x).to(dtype) * c.scale)[:, None].expand(-1, c.rank) for c in columns]
            self._masks[key] = torch.cat(parts, dim=1)
        elif x.shape[0] != self.rows:
            self.scales(columns[0].adapter, x)  # raises
        return self._masks[key]


def rows_of(args: Sequence[object], kwargs: Mapping[str, object]) -> int | None:
    """Return how many rows the batch has that a model is called with; None if its first tensor is not found."""
    given = (*args, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    return next((x.shape[0] for x in given if isinstance(x, Tensor) and x.dim() > 0), None)


class Switch:
    """What is on in one model right now; shared by all its adapted layers, so that switching is one assignment."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.routing: Routing | None = None
        self.merged: tuple[str, ...] = ()

    def on(self, present: Iterable[str]) -> list[str]:
        """Return the adapters of `present` whose change is to be added to the output now."""
        if self.disabled or self.merged:
            return []
        return [name for name in self.active if name in present]

    @contextmanager
    def routed(self, routing: Routing | None) -> Iterator[None]:
        """Use `routing` inside the block."""
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Use the base alone inside the block."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    def checkpoint_contexts(self) -> tuple[object, object]:
        """The `context_fn` of torch's checkpoint: what is in force at forward is in force again at recompute."""
        return self._forward_context(), self._recompute_context(self.routing, self.active, self.disabled)

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        yield

    @contextmanager
    def _recompute_context(self, routing: Routing | None, active: tuple[str, ...], disabled: bool) -> Iterator[None]:
        before = self.routing, self.active, self.disabled
        self.routing, self.active, self.disabled = routing, active, disabled
        try:
            yield
        finally:
            self.routing, self.active, self.disabled = before
