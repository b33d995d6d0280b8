"""One batch as the model and the loss see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from decal.ops.segments import Segments, segments

IGNORE = -100  # the label of a token outside the loss, transformers' convention


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token tensors of one micro-batch, each (B, T); labels are not shifted (transformers' convention).

    `position_ids` restart at 0 with every sample, which is how transformers keeps packed samples from attending to
    each other; it is None where every row is one sample from its first column (the plain causal mask, faster).
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None

    @cached_property
    def segments(self) -> Segments | None:
        """Where samples begin, found once; None where rows are no packed ones."""
        return None if self.position_ids is None else segments(self.position_ids)

    @property
    def tokens(self) -> int:
        """Tokens the model reads, padding included."""
        return self.input_ids.numel()

    @property
    def loss_tokens(self) -> int:
        """Tokens that are predicted and learnt: labels after the first column that are not IGNORE."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
        )

    def parts(self, count: int) -> list[Batch]:
        """Return its rows in `count` batches of about as many rows, in their order; fewer where it has fewer rows."""
        positions = self.position_ids
        return [
            Batch(input_ids=ids, labels=labels, position_ids=where)
            for ids, labels, where in zip(
                self.input_ids.tensor_split(count),
                self.labels.tensor_split(count),
                [None] * count if positions is None else positions.tensor_split(count),
                strict=True,
            )
            if len(ids)
        ]
