"""Whether the loss is a number at all; where it is not, no other check means anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from decal.checks.result import Check, failed, passed
from decal.data import pack
from decal.data.mask import Sample
from decal.training.job import Job
from decal.words import counted

NAME = "loss"


@torch.no_grad()
def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Compute the loss of the rows before anything has moved."""
    with job.numbers.autocast():
        total, count = job.loss(job.model, pack.collate([[sample] for sample in samples], pad_id=job.data.pad_id))
    loss = total.item() / max(count, 1)
    if math.isfinite(loss):
        return passed(
            NAME, f"{loss:.2f} on {counted(len(samples), 'row')}, {counted(count, 'learnt token')}, before training"
        )
    cause = "the model's weights hold NaN: download the model again"
    if job.numbers.name != "fp32":
        cause = f"{job.numbers.name} overflows (try train.precision=fp32), or {cause}"
    return failed(NAME, f"the loss is {loss}, not finite, before anything has moved", fix=f"Most likely {cause}.")
