"""The checks in their order: all of them, or the short form that begins a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from decal.checks import accumulation, finite, overfit, packing, reach, roundtrip, rows, stops, tokenizer
from decal.checks.result import Check
from decal.checks.untouched import untouched
from decal.data.mask import Sample
from decal.training.job import Job

SHORT_ROWS, SHORT_TOKENS = 4, 32
ROWS = 8
Ask = Callable[[], Check]


def short(job: Job) -> list[Check]:
    """Return the answers of the checks that take seconds. The job ends in the very bits in which it was given."""
    seen = rows.looked_at(job)
    wrong = tokenizer.ids(job, seen)
    if wrong is not None:
        return [wrong]
    few = _few(seen, SHORT_ROWS, SHORT_TOKENS)
    return list(_answers(job, [partial(finite.check, job, few), *_quick(job, seen, few, [few[0], few[-1]])]))


def full(job: Job) -> Iterator[Check]:
    """Yield the answers of all checks of a job, as they come. The job ends in the very bits in which it was given."""
    seen = rows.looked_at(job)
    few = _few(seen, ROWS, rows.TOKENS)
    longest = [rows.cut(sample, rows.TOKENS) for sample in sorted(seen, key=lambda s: -len(s.ids))[:ROWS]]
    wrong = tokenizer.ids(job, seen)
    if wrong is not None:  # no forward pass can be trusted, or even made
        yield wrong
        return
    quick = _quick(job, seen, few[:SHORT_ROWS], few[:SHORT_ROWS])
    numbers = [partial(finite.check, job, few), partial(tokenizer.check, job, longest)]
    broken = False
    for answer in _answers(job, [*numbers, *quick]):
        broken = broken or (answer.name == finite.NAME and answer.status == "failed")
        yield answer
    if not broken:
        yield from _answers(job, [partial(overfit.check, job, seen, few)], moves_all=True)


def _few(seen: Sequence[Sample], count: int, tokens: int) -> list[Sample]:
    return rows.shortest(seen, count, tokens=tokens) or [rows.cut(seen[0], tokens)]


def _quick(job: Job, seen: Sequence[Sample], few: Sequence[Sample], added: Sequence[Sample]) -> list[Ask]:
    """Return the questions that take seconds; `added` are the rows whose gradients are added up."""
    return [
        partial(stops.check, job, seen),
        partial(packing.check, job, few),
        partial(reach.check, job, few),
        partial(accumulation.check, job, added),
        partial(roundtrip.check, job, few[:2]),
    ]


def _answers(job: Job, questions: Sequence[Ask], *, moves_all: bool = False) -> Iterator[Check]:
    # Where all weights are trained, only the check that moves them has a second copy made.
    kept = moves_all or job.config.train.method == "lora"
    for ask in questions:
        began = time.perf_counter()
        with untouched(job, weights=kept):
            job.model.train()
            answer = ask()
        yield answer.after(time.perf_counter() - began)
        if answer.name == finite.NAME and answer.status == "failed":
            return  # every other answer would be about NaN
