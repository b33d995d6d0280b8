"""Whether accumulating changes the gradient: 4 micro-batches of 1 row against 1 of 4 rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decal.checks.result import Check, failed, not_applicable, passed
from decal.checks.untouched import without_dropout
from decal.data import pack
from decal.data.batch import Batch
from decal.data.mask import Sample
from decal.training import step
from decal.training.job import Job

NAME = "accumulation"
# Of the gradient's norm. The same sums in another order: 1e-6 in fp32, 2^-8 a product in bf16. Rows that weigh alike
# whatever their length, the usual mistake, differ by 1e-1 and more.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
SCALE = 1024.0  # of an fp16 loss: small enough not to overflow, large enough to keep the gradient


def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Compare the two gradients of the same rows, which should be of unlike lengths."""
    if len(samples) < 2:
        return not_applicable(NAME, "the data have a single row")
    single = [pack.collate([[sample]], pad_id=job.data.pad_id) for sample in samples]
    together = [pack.collate([[sample] for sample in samples], pad_id=job.data.pad_id)]
    with without_dropout(job.model):
        parts, whole = gradient(job, single), gradient(job, together)
    n = len(samples)
    size = max(_norm(whole), 1e-30)
    ratio = _norm(parts) / size
    torch._foreach_sub_(parts, whole)  # in place: of a whole model there is room for two gradients, not for three
    difference = _norm(parts) / size
    if difference <= TOLERANCE[job.numbers.name]:
        return passed(NAME, f"gradients of {n} x 1 and 1 x {n} rows differ by {difference:.1e}")
    return failed(
        NAME,
        f"{n} micro-batches of 1 row give another gradient than 1 of {n}: {ratio:.2f}x as long, {difference:.0%} off",
        fix="Set train.accumulate=1, and report it: this loss does not count what it is a sum over.",
    )


def gradient(job: Job, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the gradient that one step over `batches` would follow, by parameter; leave none behind."""
    scaler = torch.amp.GradScaler(job.numbers.device.type, init_scale=SCALE, enabled=job.numbers.name == "fp16")
    step.backward(job.model, batches, job.loss, scaler, precision=job.numbers)
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))
