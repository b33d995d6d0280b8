"""Whether packed samples are told apart: what a sample's loss is must not depend on its neighbour."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decal.checks import rows
from decal.checks.result import Check, failed, not_applicable, passed
from decal.checks.untouched import without_dropout
from decal.data import pack
from decal.data.mask import Sample
from decal.training.job import Job

NAME = "packing"
# Of the loss. What a mask hides is multiplied by an exact zero, so nothing differs but, where the number of tokens
# decides how a product is split, its last bits; one visible neighbour moves the loss by 1e-3 and more.
TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 2e-3}


@torch.no_grad()
def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Swap a sample's neighbour in a packed row for one of other tokens, and compare the sample's own loss."""
    if not job.config.data.packing:
        return not_applicable(NAME, "data.packing=false: each row is one sample")
    learnt = samples[-1]
    before = rows.only(samples[0], learns=False)
    other = Sample(ids=before.ids[::-1], labels=before.labels)
    if other.ids == before.ids:
        other = Sample(ids=[learnt.ids[0]] * len(before.ids), labels=before.labels)
    with without_dropout(job.model):
        first, second = (_loss(job, [neighbour, learnt]) for neighbour in (before, other))
    difference = abs(first - second) / max(abs(first), 1e-9)
    if difference <= TOLERANCE[job.numbers.name]:
        return passed(NAME, f"a swapped neighbour changes a sample's loss by {difference:.1e} of it")
    return failed(
        NAME,
        f"samples see each other: a swapped neighbour moved a sample's loss from {first:.4f} to {second:.4f}",
        fix="Set data.packing=false: this model does not keep the samples of a packed row apart.",
    )


def _loss(job: Job, row: Sequence[Sample]) -> float:
    batch = pack.collate([row], pad_id=job.data.pad_id)
    with job.numbers.autocast():
        total, count = job.loss(job.model, batch)
    return total.item() / max(count, 1)
