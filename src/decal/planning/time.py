"""How long a step and an epoch take: from the work that was counted and a card's rates, or from one measured step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from decal.planning.cards import Card
from decal.planning.shapes import Counted
from decal.planning.wanted import Wanted

LAUNCH = 7e-6  # seconds that Python and torch take for one operation; a card waits for them where steps are small
PYTHON_SHARE = 0.45  # of the operations counted, those that launch something (the others are views)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Tokens that an epoch reads, padding included, and its optimizer steps (None: as many as the tokens fill)."""

    tokens: int
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of one optimizer step and of an epoch (None where its size is not known)."""

    step: float
    tokens: int  # of one optimizer step
    epoch: float | None
    steps: int | None
    card: str

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def pace(work: Counted, wanted: Wanted, card: Card, *, epoch: Epoch | None = None) -> Pace:
    """Return the pace on `card`. The epoch's seconds are those of its tokens at the pace of the largest micro-batch.

    Products and attention go at the card's rate, all else at the speed of its memory; a card waits for Python where
    that is slower.
    """
    compute = work.flops / (card.tflops * 1e12) + work.moved / (card.bandwidth * 1e9)
    waiting = work.operations * PYTHON_SHARE * LAUNCH
    # A card works while Python goes on to the next operation; a CPU does one after the other.
    seconds = (max(compute, waiting) if wanted.device == "cuda" else compute + waiting) * wanted.train.accumulate
    step_tokens = wanted.tokens * wanted.train.accumulate
    found = Pace(step=seconds, tokens=step_tokens, steps=None, epoch=None, card=card.name)
    if epoch is None:
        return found
    steps = epoch.steps or max(1, -(-epoch.tokens // step_tokens))
    return replace(found, steps=steps, epoch=epoch.tokens / step_tokens * seconds)


def foretold(seconds: Sequence[float], tokens: Sequence[int]) -> float:
    """Return a run's seconds as they are foretold from one step: the second, for the first also pays for beginnings.

    `seconds` and `tokens` are of each step; of the seconds those of the first two alone are looked at.
    """
    measured = min(1, len(seconds) - 1)
    begun = sum(seconds[:measured])
    return begun + seconds[measured] / tokens[measured] * sum(tokens[measured:])
