"""Settings that take less memory, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from decal.planning.shapes import ACTIVATIONS, FROZEN, GRADIENTS, LOGITS, OPTIMIZER, TRAINED, WORKSPACE
from decal.planning.wanted import Wanted
from decal.spec import QuantConfig

ROWS, LENGTH, FORMAT = "train.micro_batch", "data.max_length", "quantize"
BY_TOKENS = (ACTIVATIONS, LOGITS, WORKSPACE)  # parts that grow with a micro-batch
BY_RANK = (TRAINED, GRADIENTS, OPTIMIZER)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other values for some settings. `price` says what they cost; `cost` orders: below 2 no result changes.

    `left` is about what is left of some parts of the memory.
    """

    settings: Mapping[str, Any]
    price: str
    cost: float
    left: Mapping[str, float]

    def __str__(self) -> str:
        """Return the change in the words of `decal train`."""
        return " ".join(f"{name}={_word(value)}" for name, value in self.settings.items())

    def of(self, wanted: Wanted) -> Wanted:
        """Return `wanted` with this change."""
        groups: dict[str, dict[str, Any]] = {"train": {}, "lora": {}}
        for name, value in self.settings.items():
            group, _, key = name.partition(".")
            groups.get(group, {})[key] = value
        coded = self.settings.get(FORMAT)
        return replace(
            wanted,
            train=wanted.train.model_copy(update=groups["train"]),
            lora=wanted.lora.model_copy(update=groups["lora"]),
            length=self.settings.get(LENGTH, wanted.length),
            quantize=wanted.quantize if coded is None else QuantConfig(format=coded),
        )


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def changes(wanted: Wanted, *, kept: float = 0.1) -> list[Change]:
    """Return the changes that may help `wanted`, but for shorter rows. `kept`: of activations, if layers run again."""
    train, lora, rows = wanted.train, wanted.lora, wanted.train.micro_batch
    found: list[Change] = []

    def may(settings: dict[str, Any], price: str, cost: float, left: dict[str, float]) -> None:
        found.append(Change(settings=settings, price=price, cost=cost, left=left))

    for fewer in (rows >> halved for halved in range(1, rows.bit_length())):
        settings = {ROWS: fewer, "train.accumulate": -(-rows * train.accumulate // fewer)}
        cost = 0.5 + 0.1 * math.log2(rows / fewer)
        may(settings, "equal results; smaller products may be slower", cost, dict.fromkeys(BY_TOKENS, fewer / rows))
    if not train.gradient_checkpointing:
        price = "equal results; layers are computed twice, a third more time"
        may({"train.gradient_checkpointing": True}, price, 1, {ACTIVATIONS: kept})
    if "8bit" not in train.optimizer:
        price = "the optimizer's moments are rounded to 8 bits"
        may({"train.optimizer": f"{train.optimizer}8bit"}, price, 2, {OPTIMIZER: 0.27})
    if wanted.full:
        left = {TRAINED: 0.5, GRADIENTS: 0.02, OPTIMIZER: 0.02}
        may({"train.method": "lora"}, "an adapter is trained, not all weights", 3, left)
        price = "an adapter is trained, on weights rounded to 4 bits"
        may({"train.method": "lora", FORMAT: "nf4"}, price, 4, {**left, TRAINED: 0.2})
        return found
    if wanted.quantize is None:
        may({FORMAT: "nf4"}, "the frozen weights are rounded to 4 bits", 2.5, {FROZEN: 0.26})
    if lora.r > 8:
        alpha = lora.lora_alpha * 8 / lora.r  # the scale alpha / r stays
        smaller = {"lora.r": 8, "lora.lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        may(smaller, "a smaller adapter", 3, dict.fromkeys(BY_RANK, 8 / lora.r))
    if lora.target_modules == "all-linear":
        price = "an adapter on attention's layers alone"
        may({"lora.target_modules": "attention"}, price, 3.5, dict.fromkeys(BY_RANK, 0.35))
    return found


def cut(wanted: Wanted, length: int) -> Change:
    """Return the change to rows of `length` tokens; half as long costs as much as a smaller adapter."""
    return Change(
        settings={LENGTH: length},
        price="longer rows are dropped, or cut (data.too_long)",
        cost=2.5 + 0.5 * math.log2(wanted.length / length),
        left=dict.fromkeys(BY_TOKENS, length / wanted.length),
    )
