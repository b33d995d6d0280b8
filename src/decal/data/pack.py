"""Pack samples into rows and rows into tensors, so that no sample sees another.

Within a row every sample's positions start again at 0 and its first label is IGNORE. transformers turns restarting
positions (with attention_mask=None and no cache) into a block-diagonal causal mask.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from decal.data.batch import IGNORE, Batch
from decal.data.mask import Sample


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return rows of sample indices, each at most `room` tokens: best fit, longest sample first; deterministic.

    Samples of equal length keep their order. O(n log room). Best-fit decreasing needs at most 11/9 of the rows of
    the best packing (Johnson 1973).
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free tokens -> rows with that much free
    spaces: list[int] = []  # the keys of by_space with a row, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[index]
        assert 0 < need <= room
        at = bisect_left(spaces, need)
        if at == len(spaces):
            row, space = len(rows), room
            rows.append([])
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        rows[row].append(index)
        left = space - need
        if left not in by_space:
            by_space[left] = []
            insort(spaces, left)
        by_space[left].append(row)
    return rows


def collate(rows: Sequence[Sequence[Sample]], *, pad_id: int) -> Batch:
    """Return rows of samples as one batch, (B, T) with T the longest row; padding stands at the right.

    Padding is known by its place, never by its token (pad may equal eos): its labels are IGNORE and its positions
    start again at 0. Where every row is one sample, `position_ids` is None: behind a causal mask nothing reads padding.
    """
    width = max(sum(len(sample.ids) for sample in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.long)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.ids)
            ids[number, start:end] = torch.tensor(sample.ids)
            labels[number, start + 1 : end] = torch.tensor(sample.labels[1:], dtype=torch.long)
            positions[number, start:end] = torch.arange(len(sample.ids))
            start = end
        positions[number, start:] = torch.arange(width - start)
    single = all(len(row) == 1 for row in rows)
    return Batch(input_ids=ids, labels=labels, position_ids=None if single else positions)
