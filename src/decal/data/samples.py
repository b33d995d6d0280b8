"""Tokenised samples: held in memory as flat arrays, or made anew from a stream each epoch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from decal.data.mask import Sample


class Samples(Sequence[Sample]):
    """A list of samples that takes 8 bytes a token (lists of Python ints take some 70)."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._ids, self._labels, self._ends = array("i"), array("i"), array("q", [0])
        for sample in samples:
            self._ids.extend(sample.ids)
            self._labels.extend(sample.labels)
            self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def length(self, index: int) -> int:
        """Return the number of tokens of one sample."""
        return self._ends[index + 1] - self._ends[index]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index], self._ends[index + 1]
        return Sample(ids=self._ids[start:end].tolist(), labels=self._labels[start:end].tolist())


class Stream:
    """Samples made as they are read; `epoch(n)` gives the order of epoch n, the same at each call."""

    def __init__(self, make: Callable[[int], Iterator[Sample]]) -> None:
        self._make = make

    def epoch(self, epoch: int) -> Iterator[Sample]:
        """Yield the samples of one epoch."""
        return self._make(epoch)
