"""Batches in the order in which training takes them: shuffled anew each epoch, resumable at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    Iterating goes on without end, epoch after epoch; `epoch()` yields the rest of the current one. Each epoch comes in
    another order, which depends on (seed, epoch number) alone; packed rows are composed once and then shuffled, so
    every epoch has the same number of steps. `state_dict` says how far the batches were given out: another Batches
    with the same arguments that loads it goes on with exactly the batches that would have come.
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
        self._samples = samples
        self._rows = None if isinstance(samples, Stream) else self._compose(samples)
        self._epoch = 0
        self._position = 0  # steps of this epoch that were given out

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch; None for a stream, whose length nobody knows."""
        if self._rows is None:
            return None
        return -(-len(self._rows) // (self.micro_batch * self.accumulate))

    def largest(self) -> Batch | None:
        """Return a micro-batch of the longest rows: none takes more memory. None for a stream."""
        samples = self._samples
        if not self._rows or isinstance(samples, Stream):
            return None
        longest = sorted(self._rows, key=lambda row: sum(samples.length(index) for index in row))[-self.micro_batch :]
        return pack.collate([[samples[index] for index in row] for row in longest], pad_id=self.pad_id)

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        while True:
            yield from self.epoch()

    def epoch(self) -> Iterator[tuple[Batch, ...]]:
        """Yield the rest of the current epoch. Raises DataError if a whole epoch has no sample."""
        groups = _grouped(self._epoch_rows(), self.micro_batch * self.accumulate)
        for group in islice(groups, self._position, None):
            self._position += 1  # before the yield: a state saved while this step runs counts it
            yield tuple(pack.collate(rows, pad_id=self.pad_id) for rows in _grouped(iter(group), self.micro_batch))
        if self._position == 0:
            raise DataError("a whole epoch gave no usable row", fix="Read the data ledger: it counts what was dropped.")
        self._epoch, self._position = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int | None]:
        """Return how far the batches were given out, and what they were made from: plain numbers."""
        return {"epoch": self._epoch, "position": self._position, **self._made_from()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another Batches stood; raise DataError if it was made from other data or settings."""
        for name, value in self._made_from().items():
            if state[name] != value:
                raise DataError(
                    f"the batches cannot go on: {name} has changed since the checkpoint",
                    got=f"{value}, then {state[name]}",
                    fix="Resume with the same data, settings and seed, or start a new run.",
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _made_from(self) -> dict[str, int | None]:
        rows = None if self._rows is None else len(self._rows)
        return {"seed": self.seed, "rows": rows, "rows_per_step": self.micro_batch * self.accumulate}

    def _compose(self, samples: Samples) -> list[list[int]]:
        if not self.packing:
            return [[index] for index in range(len(samples))]
        order = torch.randperm(len(samples), generator=_generator(self.seed, epoch=-1)).tolist()
        rows = pack.best_fit([samples.length(index) for index in order], self.length)
        return [[order[index] for index in row] for row in rows]

    def _epoch_rows(self) -> Iterator[list[Sample]]:
        if isinstance(self._samples, Stream):
            yield from self._stream_rows(self._samples.epoch(self._epoch))
            return
        assert self._rows is not None
        for number in torch.randperm(len(self._rows), generator=_generator(self.seed, epoch=self._epoch)).tolist():
            yield [self._samples[index] for index in self._rows[number]]

    def _stream_rows(self, stream: Iterator[Sample]) -> Iterator[list[Sample]]:
        for window in _grouped(stream, WINDOW if self.packing else 1):
            for row in pack.best_fit([len(sample.ids) for sample in window], self.length):
                yield [window[index] for index in row]


class InOrder:
    """Every sample once, in an order that never changes: for evaluation. Iterable again and again."""

    def __init__(self, samples: Samples, *, length: int, micro_batch: int, packing: bool = True, pad_id: int) -> None:
        count = len(samples)
        lengths = [samples.length(index) for index in range(count)]
        self._rows = pack.best_fit(lengths, length) if packing else [[index] for index in range(count)]
        self._samples = samples
        self._micro_batch = micro_batch
        self._pad_id = pad_id

    def __len__(self) -> int:
        return -(-len(self._rows) // self._micro_batch)

    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return max(sum(self._samples.length(index) for index in row) for row in self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for group in _grouped(iter(self._rows), self._micro_batch):
            yield pack.collate([[self._samples[index] for index in row] for row in group], pad_id=self._pad_id)


def _generator(seed: int, *, epoch: int) -> torch.Generator:
    """Return the generator of one epoch; epoch -1 composes the packed rows."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)


def _grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(items, size)):
        yield group
