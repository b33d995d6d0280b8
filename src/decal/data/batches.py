"""Batches in the order in which training takes them: shuffled anew each epoch, resumable at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from decal.data import pack
from decal.data.batch import Batch
from decal.data.mask import Sample
from decal.data.samples import Samples, Stream
from decal.errors import DataError

WINDOW = 512  # samples of a stream that are packed together


class Batches:
    """Micro-batches grouped by optimizer step: each item is a tuple of at most `accumulate` batches.

    Iterating yields the rest of the current epoch; the next iteration is the next epoch, in another order that
    depends on (seed, epoch) alone. `state_dict` says how far it came: a new Batches with the same arguments that loads
    it goes on with exactly the batches that would have come. Packed rows are composed once and shuffled each epoch,
    so every epoch has the same number of steps.
    """

    def __init__(
        self,
        samples: Samples | Stream,
        *,
        length: int,
        micro_batch: int,
        accumulate: int = 1,
        packing: bool = True,
        pad_id: int,
        seed: int = 0,
    ) -> None:
        self.length = length
        self.micro_batch = micro_batch
        self.accumulate = accumulate
        self.packing = packing
        self.pad_id = pad_id
        self.seed = seed
        self.epoch = 0
        self.position = 0  # steps of this epoch that were given out
        self._samples = samples
        self._rows = [] if isinstance(samples, Stream) else self._compose(samples)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch; None for a stream, whose length nobody knows."""
        if isinstance(self._samples, Stream):
            return None
        return -(-len(self._rows) // (self.micro_batch * self.accumulate))

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        epoch, done = self.epoch, self.position
        groups = _grouped(self._epoch_rows(epoch), self.micro_batch * self.accumulate)
        for group in islice(groups, done, None):
            self.position += 1
            yield tuple(pack.collate(rows, pad_id=self.pad_id) for rows in _grouped(iter(group), self.micro_batch))
        if self.position == 0:
            raise DataError("the stream gave no usable row in a whole pass", fix="Check the data with streaming off.")
        self.epoch, self.position = epoch + 1, 0

    def forever(self) -> Iterator[tuple[Batch, ...]]:
        """Yield steps without end, epoch after epoch."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, int]:
        """Return how far the batches were given out: plain numbers."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another Batches with the same arguments stood."""
        if state["seed"] != self.seed:
            raise DataError("the batches were drawn with another seed", got=state["seed"], fix=f"Use {self.seed}.")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _compose(self, samples: Samples) -> list[list[int]]:
        if not self.packing:
            return [[index] for index in range(len(samples))]
        order = torch.randperm(len(samples), generator=_generator(self.seed, -1)).tolist()
        rows = pack.best_fit([samples.length(index) for index in order], self.length)
        return [[order[index] for index in row] for row in rows]

    def _epoch_rows(self, epoch: int) -> Iterator[list[Sample]]:
        if isinstance(self._samples, Stream):
            yield from self._stream_rows(self._samples.epoch(epoch))
            return
        for number in torch.randperm(len(self._rows), generator=_generator(self.seed, epoch)).tolist():
            yield [self._samples[index] for index in self._rows[number]]

    def _stream_rows(self, stream: Iterator[Sample]) -> Iterator[list[Sample]]:
        if not self.packing:
            for sample in stream:
                yield [sample]
            return
        for window in _grouped(stream, WINDOW):
            for row in pack.best_fit([len(sample.ids) for sample in window], self.length):
                yield [window[index] for index in row]


def in_order(
    samples: Sequence[Sample], *, length: int, micro_batch: int, packing: bool, pad_id: int
) -> Iterator[Batch]:
    """Yield every sample once, in an order that never changes: for evaluation."""
    if packing:
        rows = pack.best_fit([len(sample.ids) for sample in samples], length)
    else:
        rows = [[index] for index in range(len(samples))]
    for group in _grouped(iter(rows), micro_batch):
        yield pack.collate([[samples[index] for index in row] for row in group], pad_id=pad_id)


def _generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of one epoch; epoch -1 composes the packed rows."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)


def _grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(items, size)):
        yield group
