"""Whether the replies teach the model to stop."""

from __future__ import annotations

from collections.abc import Sequence

from decal.checks import rows
from decal.checks.result import Check, failed, passed
from decal.data.mask import Sample
from decal.training.job import Job

NAME = "stop token"
ENOUGH = 0.5  # of the rows: with fewer the model more often sees a reply that goes on than one that ends


def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Count the rows among `samples` whose labels hold a token at which generation stops."""
    ids = job.data.stop_ids
    stops = set(ids)
    teach = sum(not stops.isdisjoint(rows.learnt(sample)) for sample in samples)
    names = ", ".join(job.tokenizer.convert_ids_to_tokens(list(ids)))
    measure = f"rows that learn {names}: {teach:,} of {len(samples):,}"
    if teach >= ENOUGH * len(samples):
        return passed(NAME, measure)
    if job.data.ledger.stops_lost:
        longest = job.config.data.max_length
        fix = f"Raise data.max_length (now {longest}), or set data.too_long=drop: replies are cut before they end."
    else:
        fix = "Give a data.chat_template that ends each reply with a special token, inside of what is learnt."
    return failed(NAME, f"{measure}; replies will not end", fix=fix)
