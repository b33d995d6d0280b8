"""What would make a run fit: settings that take less memory, the cheapest in time and quality first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from decal.errors import DecalError
from decal.planning import memory
from decal.planning.memory import Forecast
from decal.planning.shapes import ACTIVATIONS, FROZEN, GRADIENTS, LOGITS, OPTIMIZER, TRAINED, WORKSPACE
from decal.planning.wanted import Wanted
from decal.spec import QuantConfig

SHORTEST = 128  # tokens: no row is cut below this
TOGETHER = 3  # changes that are combined at most
COUNTED = 12  # combinations that are counted at most; a guess says which are worth it
HOPE = 1.3  # a guess may be so much too high


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other values for some settings. `price` says what they cost; `cost` orders: below 2 no result changes."""

    price: str
    cost: float
    train: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    quantize: str | None = None

    @property
    def settings(self) -> str:
        """The change in the words of `decal train`."""
        words = [f"train.{name}={_word(value)}" for name, value in self.train.items()]
        words += [f"lora.{name}={_word(value)}" for name, value in self.lora.items()]
        words += [] if self.length is None else [f"data.max_length={self.length}"]
        return " ".join(words + ([] if self.quantize is None else [f"quantize={self.quantize}"]))

    def touches(self) -> set[str]:
        return {word.partition("=")[0] for word in self.settings.split()}

    def of(self, wanted: Wanted) -> Wanted:
        """Return `wanted` with this change."""
        return replace(
            wanted,
            train=wanted.train.model_copy(update=self.train),
            lora=wanted.lora.model_copy(update=self.lora),
            length=self.length or wanted.length,
            quantize=wanted.quantize if self.quantize is None else QuantConfig(format=self.quantize),  # type: ignore[arg-type]  # one of its formats
        )

    def guess(self, parts: dict[str, float], wanted: Wanted) -> dict[str, float]:
        """Return about what the parts come down to; only to pass over what cannot be enough."""
        share = dict.fromkeys(parts, 1.0)
        if "micro_batch" in self.train or self.length is not None:
            tokens = self.train.get("micro_batch", wanted.train.micro_batch) * (self.length or wanted.length)
            share |= dict.fromkeys((ACTIVATIONS, WORKSPACE), tokens / wanted.tokens)
        if "gradient_checkpointing" in self.train:
            share[ACTIVATIONS] *= 0.1
        if "optimizer" in self.train:
            share[OPTIMIZER] *= 0.3
        if "method" in self.train:
            share |= dict.fromkeys((OPTIMIZER, GRADIENTS), 0.02) | {TRAINED: 0.5}
        if self.quantize is not None:
            share |= {FROZEN: 0.3, TRAINED: 0.3 if wanted.full else 1.0}
        return {part: size * share[part] for part, size in parts.items()}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def changes(wanted: Wanted) -> list[Change]:
    """Return the changes that may help `wanted`, the cheapest first."""
    train, lora = wanted.train, wanted.lora
    found = list(_batches(wanted))
    if not train.gradient_checkpointing:
        price = "equal results; layers are computed twice, about a third more time"
        found.append(Change(price=price, cost=1.5, train={"gradient_checkpointing": True}))
    if "8bit" not in train.optimizer:
        name = f"{train.optimizer}8bit"
        found.append(Change(price="moments are rounded to 8 bits", cost=2, train={"optimizer": name}))
    if wanted.full:
        found.append(Change(price="an adapter learns, not all weights", cost=3, train={"method": "lora"}))
        coded = Change(price="an adapter learns on 4-bit weights", cost=4, train={"method": "lora"}, quantize="nf4")
        found.append(coded)
    elif wanted.quantize is None:
        found.append(Change(price="the frozen weights are rounded to 4 bits", cost=2.5, quantize="nf4"))
    for size, cost in ((wanted.length // 2, 3.0), (wanted.length // 4, 3.5)):
        if size >= SHORTEST:
            found.append(Change(price=f"rows over {size} tokens are cut", cost=cost, length=size))
    if not wanted.full and lora.r > 8:
        found.append(Change(price="a smaller adapter", cost=4.5, lora={"r": 8, "lora_alpha": 16}))
    if not wanted.full and lora.target_modules == "all-linear":
        found.append(Change(price="an adapter on attention alone", cost=5, lora={"target_modules": "attention"}))
    return sorted(found, key=lambda change: change.cost)


def _batches(wanted: Wanted) -> Iterator[Change]:
    rows = wanted.train.micro_batch
    for size in sorted({rows // 2, 1} - {0, rows}, reverse=True):
        rounds = -(-rows * wanted.train.accumulate // size)
        price = "equal results; smaller products may be slower"
        yield Change(price=price, cost=1 + 0.1 / size, train={"micro_batch": size, "accumulate": rounds})


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Changes that together make a run fit, and what it takes then."""

    changes: tuple[Change, ...]
    forecast: Forecast

    @property
    def settings(self) -> str:
        return " ".join(change.settings for change in self.changes)

    @property
    def price(self) -> str:
        return "; ".join(change.price for change in self.changes)


def that_fit(forecast: Forecast, room: int, *, count: int = 3) -> list[Fitting]:
    """Return the cheapest ways to bring a run's need down to `room` bytes, counted, at most `count`.

    Each has one change, or as many as it takes; none holds another that fits without the rest.
    """
    known = changes(forecast.wanted)
    sets = [chosen for n in range(1, TOGETHER + 1) for chosen in combinations(known, n) if _agree(chosen)]
    found: list[Fitting] = []
    counted = 0
    for chosen in sorted(sets, key=lambda chosen: (sum(change.cost for change in chosen), len(chosen))):
        if len(found) == count or counted == COUNTED:
            break
        if any(set(f.settings.split()) <= {w for c in chosen for w in c.settings.split()} for f in found):
            continue
        if _guess(chosen, forecast) > room * HOPE:
            continue
        counted += 1
        tried = _try(chosen, forecast.wanted)
        if tried is not None and tried.needed <= room:
            found.append(Fitting(changes=chosen, forecast=tried))
    return found


def _agree(chosen: tuple[Change, ...]) -> bool:
    """Whether no two of the changes are about the same setting."""
    touched = [name for change in chosen for name in change.touches()]
    return len(touched) == len(set(touched))


def _guess(chosen: tuple[Change, ...], forecast: Forecast) -> float:
    training = forecast.phase("training")
    parts = {part: float(size) for part, size in training.parts.items()}
    overhead = forecast.needed - training.peak
    for change in chosen:
        parts = change.guess(parts, forecast.wanted)
    return sum(size for part, size in parts.items() if part not in (LOGITS, WORKSPACE)) + min(overhead, memory.CONTEXT)


def _try(chosen: tuple[Change, ...], wanted: Wanted) -> Forecast | None:
    for change in chosen:
        wanted = change.of(wanted)
    try:
        return memory.forecast(wanted)
    except DecalError:  # this model has no such layers, or cannot be stored so
        return None
