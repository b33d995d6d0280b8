"""The few short rows that checks compute on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from decal.data.batch import IGNORE
from decal.data.mask import Sample
from decal.data.samples import Samples, Stream
from decal.training.job import Job

LOOKED_AT = 2000  # rows among which the shortest are sought
TOKENS = 48  # of a row after cutting


def looked_at(job: Job) -> list[Sample]:
    """Return the first rows of the training data, as they are."""
    data: Samples | Stream = job.data.train
    if isinstance(data, Stream):
        return list(islice(data.epoch(0), 256))  # they are tokenised anew for this
    return data[:LOOKED_AT]


def shortest(samples: Iterable[Sample], count: int, *, tokens: int = TOKENS) -> list[Sample]:
    """Return up to `count` of the shortest rows with unlike prompts, cut to `tokens`; fewer prompts, fewer rows."""
    chosen: list[Sample] = []
    seen: set[tuple[int, ...]] = set()
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        row = cut(sample, tokens)
        asked = prompt(row)
        if len(row.ids) < 3 or not learnt(row) or (asked in seen and len(asked) > 1):
            continue
        seen.add(asked)
        chosen.append(row)
        if len(chosen) == count:
            break
    return chosen


def cut(sample: Sample, tokens: int) -> Sample:
    """Return at most `tokens` tokens of a row: those up to its last learnt one, which is where the stop token is."""
    last = max((at for at, label in enumerate(sample.labels) if label != IGNORE), default=len(sample.ids) - 1)
    first = max(0, last + 1 - tokens)
    return Sample(ids=sample.ids[first : last + 1], labels=[IGNORE, *sample.labels[first + 1 : last + 1]])


def learnt(sample: Sample) -> list[int]:
    """Return the tokens in the loss; the first of a row never is."""
    return [label for label in sample.labels[1:] if label != IGNORE]


def prompt(sample: Sample) -> tuple[int, ...]:
    """Return the tokens before the first learnt one."""
    first = next((at for at, label in enumerate(sample.labels) if at and label != IGNORE), len(sample.ids))
    return tuple(sample.ids[:first])


def only(sample: Sample, *, learns: bool) -> Sample:
    """Return the row as it is, or with nothing to learn."""
    return sample if learns else Sample(ids=sample.ids, labels=[IGNORE] * len(sample.ids))
