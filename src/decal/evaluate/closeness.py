"""How far one model's answers, or one weight, lie from another's: KL, perplexity, what rounding does to a change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 256  # rows of a weight, or of logits, that are widened at a time


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What writing W + delta in the output's dtype does to the update, over all adapted weights."""

    survived: float  # the share of the update along its own direction: <written - W, delta> / <delta, delta>
    unchanged: float  # share of the weights with a change that are the same number after the merge


@dataclass
class Tally:
    """Sums up what writing each summed weight did to its change."""

    along: float = field(default=0.0)
    square: float = field(default=0.0)
    same: int = field(default=0)
    changed: int = field(default=0)

    def add(self, W: Tensor, change: Tensor, rounded: Callable[[Tensor], Tensor]) -> None:
        """Add one weight W (out, in) and its change."""
        after, before = rounded(W + change), rounded(W)
        for a, b, delta in zip(*(torch.split(part, CHUNK) for part in (after, before, change)), strict=True):
            written, moved = a.float().sub_(b), delta != 0
            self.along += float(torch.dot(written.flatten(), delta.flatten()))
            self.square += float(torch.dot(delta.flatten(), delta.flatten()))
            self.changed += int(moved.sum())
            self.same += int(moved.logical_and_(written == 0).sum())

    def rounding(self) -> Rounding:
        """Return the shares."""
        if self.square == 0:
            return Rounding(survived=1.0, unchanged=0.0)
        return Rounding(survived=self.along / self.square, unchanged=self.same / self.changed)


@torch.no_grad()
def logits_of(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits of all rows, (tokens, V) fp32, from one pass: each weight is needed once."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # on the right: no causal model sees it from a token
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[mask.bool()].float()


def perplexity(logits: Tensor, rows: Sequence[Tensor]) -> float:
    """Return exp of the mean cross entropy of each next token."""
    losses = [
        F.cross_entropy(part[:-1].double(), ids[1:], reduction="none")
        for part, ids in zip(torch.split(logits, [len(ids) for ids in rows]), rows, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


def mean_kl(target_NV: Tensor, other_NV: Tensor) -> float:
    """Return the mean over rows of KL(target || other) in nats, from logits; infinite where one is not finite."""
    total = 0.0
    for target, other in zip(torch.split(target_NV, CHUNK), torch.split(other_NV, CHUNK), strict=True):
        p, q = F.log_softmax(target.double(), -1), F.log_softmax(other.double(), -1)
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    mean = total / len(target_NV)
    return max(0.0, mean) if math.isfinite(mean) else math.inf
