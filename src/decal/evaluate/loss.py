"""Mean loss per token and perplexity over an evaluation set."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from decal.data.batch import Batch
from decal.errors import DataError, RunError
from decal.model.evaluating import evaluating

LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]  # the summed loss of a batch, and the count it sums over


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean loss over `count` tokens. Perplexity is e to the mean loss."""

    loss: float
    count: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: LossSum,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Return the mean loss over all loss tokens of `batches`, whatever their sizes.

    Where a card's memory is too small for a batch, it goes over its rows in halves.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            if batch.loss_tokens == 0:
                continue
            part, tokens = _measure(model, batch, loss, autocast)
            total, count = total + part, count + tokens
    if count == 0:
        raise DataError(
            "the evaluation set holds no token to measure", fix="Look at its ledger: the loss mask is empty."
        )
    if not math.isfinite(total):
        raise RunError(
            "the evaluation loss is not finite",
            got=total,
            fix="Lower train.lr: the weights have diverged.",
        )
    return Evaluation(loss=total / count, count=count)


def _measure(
    model: nn.Module, batch: Batch, loss: LossSum, autocast: Callable[[], AbstractContextManager[object]]
) -> tuple[float, int]:
    """Return the summed loss, as a Python float (fp64, whatever the set's size), and its count."""
    try:
        with autocast():
            total, count = loss(model, batch)
        return float(total), count
    except torch.OutOfMemoryError:
        if len(batch.input_ids) == 1:
            raise
    _say_halved()
    halves = [_measure(model, half, loss, autocast) for half in batch.parts(2) if half.loss_tokens > 0]
    return sum(total for total, _ in halves), sum(count for _, count in halves)


@cache
def _say_halved() -> None:
    logging.getLogger("decal").warning(
        "memory ran out while the loss was measured: such batches are measured in halves, with equal results but slower"
    )
