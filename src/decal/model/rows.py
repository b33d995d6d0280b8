"""The embedding's rows against the tokenizer's ids: tokens without a row, and new rows that no file would hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from decal.errors import ConfigError
from decal.words import counted


class Row(Protocol):
    """Anything with token ids."""

    @property
    def ids(self) -> Sequence[int]: ...


def count(model: Any) -> int | None:
    """Return how many rows the input embedding has; None where there is no such table."""
    get = getattr(model, "get_input_embeddings", None)
    table = get() if get is not None else None
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])


def without_row(model: nn.Module, tokenizer: Any) -> dict[str, int]:
    """Return the tokens, with their ids, that the embedding has no row for: lowest id first."""
    rows = count(model)
    if rows is None:
        return {}
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= rows]
    return {token: i for i, token in sorted(beyond)}


def check(model: nn.Module, tokenizer: Any, used: Iterable[Row] = ()) -> str | None:
    """Return a line for people if the tokenizer has tokens without a row; None if all have one.

    Raises ConfigError if one of them is among the ids of `used`: training would stop there.
    """
    beyond = without_row(model, tokenizer)
    if not beyond:
        return None
    rows = count(model)
    assert rows is not None
    first = ", ".join(f"{token!r} ({i})" for token, i in list(beyond.items())[:3])
    what = (
        f"the tokenizer has {counted(len(beyond), 'token')} for which the model's embedding of {rows:,} rows has none"
    )
    number = next((n for n, row in enumerate(used, start=1) if max(row.ids, default=0) >= rows), None)
    if number is not None:
        raise ConfigError(
            f"{what}, and the data use them (first in used row {number})",
            got=first,
            fix=f"Enlarge it: model.resize_token_embeddings({max(beyond.values()) + 1}), save it with its tokenizer, "
            "and train the new rows (lora.trainable_token_indices).",
        )
    return f"{what}: {first}. A text with one of them would fail"
