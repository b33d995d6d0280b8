"""Whether a budget of a card's memory can be met at all, asked before the weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from decal.errors import ConfigError
from decal.planning import fit, memory
from decal.planning.memory import Known
from decal.planning.shapes import ACTIVATIONS
from decal.planning.sizes import told
from decal.planning.wanted import Wanted

SURE = 0.9  # of a forecast: it may be too high, and a run that fits must not be refused


def least(asked: Wanted, known: Known) -> tuple[memory.Forecast, int]:
    """Return the forecast of a run whose layers are all computed again, and the least bytes that a card must have.

    Their inputs then lie in host memory, and the embedding's table where it is not the head's, too
    (training/budget.py).
    """
    again = replace(asked, train=asked.train.model_copy(update={"gradient_checkpointing": True}))
    found = memory.forecast(again, known)
    training = found.phase("training")
    return found, int(found.needed_at(training.peak - training.parts[ACTIVATIONS] - _table(known.model(again))))


def _table(model: Any) -> int:
    """Return the bytes of an embedding's table that may lie in host memory."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    table, head = inner.get_input_embeddings().weight, inner.get_output_embeddings()
    may = not table.requires_grad and getattr(head, "weight", None) is not table
    return table.numel() * table.element_size() if may else 0


def refuse_too_small(asked: Wanted, limit: int) -> None:
    """Raise ConfigError, with the cheapest changes that would fit, if a run cannot be brought within `limit` bytes."""
    known = Known()
    found, needed = least(asked, known)
    if SURE * needed <= limit:
        return
    offer = fit.offer(found, limit, known=known)
    ways = [way.settings for way in offer.fittings]
    raise ConfigError(
        "the budget cannot be met, even with every layer computed again from an input in host memory",
        got=f"train.memory={told(limit)}; a step needs about {told(needed)}",
        fix=f"What would fit, the cheapest first: {'; or '.join(ways)}." if ways else "Take a smaller model.",
    )
