"""One optimizer step over the micro-batches of an accumulated batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from decal.data.batch import Batch
from decal.errors import DataError, RunError
from decal.training.losses import Loss
from decal.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did. `loss` is the mean over the accumulated batch, `grad_norm` that before clipping."""

    loss: float
    grad_norm: float
    count: int  # what the loss is a mean over: loss tokens
    tokens: int
    skipped: bool  # fp16 only: the scaled gradient overflowed and the weights stand as they were


class NotFinite(RunError):
    """The loss or the gradient is NaN or infinite, and the weights stand as they were before the step."""

    def __init__(self, name: str, value: float, *, fix: str) -> None:
        self.name = name
        self.value = value
        what = f"the {name} is not finite, so training stopped before the weights could follow it"
        super().__init__(what, got=value, fix=fix)


class Backward(Protocol):
    """How the gradients of a step come about: `backward` below, or replayed (training/graphs.py)."""

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss: Loss,
        scaler: torch.amp.GradScaler,
        *,
        precision: Precision,
    ) -> Tensor: ...


def take_step(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    precision: Precision,
    limit: float,
    inspect: Callable[[], object] | None = None,
    run: Backward | None = None,
) -> StepResult:
    """Move the weights by the gradient of the mean loss over all micro-batches together, clipped to norm `limit`.

    The mean is over the counts of the whole accumulated batch, so 4 micro-batches of 1 row give the gradient of 1 of
    4 rows. `inspect` is called when the gradients are there and the weights have not moved yet. Raises NotFinite
    before the weights move if the loss, or outside fp16 the gradient, is not finite.
    """
    total = (run or backward)(model, batches, loss, scaler, precision=precision)
    if inspect is not None:
        inspect()
    scaler.unscale_(optimizer)
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
    torch.nn.utils.clip_grads_with_norm_(weights, limit, norm)
    both = torch.stack([total, norm.float()])
    if _skips_by_itself(optimizer, scaler):  # the card decides, so that the host need not wait before the step
        optimizer.found_inf = (~both.isfinite().all()).float()  # type: ignore[attr-defined]  # as GradScaler does
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
        mean, grad_norm = both.tolist()
        overflow = False
        _check_finite(mean, grad_norm)
    else:
        mean, grad_norm = both.tolist()  # the step's one wait for the device
        overflow = scaler.is_enabled() and not math.isfinite(grad_norm)
        _check_finite(mean, 0.0 if overflow else grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    counts = sum(loss.count(batch) for batch in batches)
    return StepResult(
        loss=mean, grad_norm=grad_norm, count=counts, tokens=sum(b.tokens for b in batches), skipped=overflow
    )


def _skips_by_itself(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Whether the optimizer leaves its weights and states alone where `found_inf` is 1: torch's fused AdamW."""
    groups = optimizer.param_groups
    fused = type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in groups)
    return fused and not scaler.is_enabled() and groups[0]["params"][0].is_cuda


def backward(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler, *, precision: Precision
) -> Tensor:
    """Add the gradient of the mean loss over all micro-batches to the weights' `.grad`; return that mean."""
    counts = [loss.count(batch) for batch in batches]
    total = sum(counts)
    if total == 0:
        raise DataError(
            "a whole step holds no token to learn from",
            got=f"{len(batches)} micro-batches",
            fix="Look at the data ledger: the loss mask of these rows is empty.",
        )
    mean = torch.zeros((), device=precision.device)
    for batch, count in zip(batches, counts, strict=True):
        if count == 0:
            continue
        with precision.autocast():
            part = loss(model, batch)[0] / total
        scaler.scale(part).backward()  # type: ignore[no-untyped-call]  # torch's
        mean += part.detach()
    return mean


def _check_finite(loss: float, grad_norm: float) -> None:
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise NotFinite(name, value, fix="Lower train.lr, or look for NaN in the model's weights.")
