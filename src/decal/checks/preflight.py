"""The checks in their order: all of them, or the short form that begins a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from decal.checks import accumulation, packing, reach, roundtrip, rows, stops
from decal.checks.result import Check
from decal.checks.untouched import untouched
from decal.data.mask import Sample
from decal.training.job import Job

SHORT_ROWS, SHORT_TOKENS = 4, 32
ROWS = 8


def short(job: Job) -> list[Check]:
    """Return the answers of the checks that take seconds. The job ends in the very bits in which it was given."""
    seen = rows.looked_at(job)
    few = rows.shortest(seen, SHORT_ROWS, tokens=SHORT_TOKENS) or [rows.cut(seen[0], SHORT_TOKENS)]
    return list(_answers(job, seen, few))


def _answers(job: Job, seen: Sequence[Sample], few: Sequence[Sample]) -> Iterator[Check]:
    lora = job.config.train.method == "lora"
    questions: list[Callable[[], Check]] = [
        partial(stops.check, job, seen),
        partial(packing.check, job, few),
        partial(accumulation.check, job, few),
        partial(reach.check, job, few),
        partial(roundtrip.check, job, few[:2]),
    ]
    for ask in questions:
        began = time.perf_counter()
        with untouched(job, weights=lora):
            job.model.train()
            answer = ask()
        yield answer.after(time.perf_counter() - began)
