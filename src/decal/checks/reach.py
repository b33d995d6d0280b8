"""Whether everything that is to be trained gets a gradient and moves, entry by entry, at the run's own rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decal.checks.result import Check, failed, passed
from decal.data import pack
from decal.data.mask import Sample
from decal.errors import RunError
from decal.training import alive, optim, step
from decal.training.job import Job

NAME = "reach"
# Of the entries that have a gradient. AdamW's first steps are lr long whatever the gradient; where that is below half
# a unit in the last place the sum is rounded back. fp32 adapters at usual rates move 99% and more.
ENOUGH = 0.5
TARGETS = "Check that lora.target_modules lie in the part of the model that the loss depends on."
STEPS = 2  # B starts at zero, so A's first gradient is zero, too: A moves in the second step


@dataclass(frozen=True, kw_only=True)
class Movement:
    """What a step did to one parameter: entries that had a gradient, and those of them that changed."""

    name: str
    reached: int
    moved: int


def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Take the first two steps on a real batch, each parameter for itself, and count what moved.

    To be called inside `untouched`. Full fine-tuning takes one step, and on copies of one parameter at a time: the
    whole model is never held twice.
    """
    batch = pack.collate([[sample] for sample in samples], pad_id=job.data.pad_id)
    lora = job.config.train.method == "lora"
    totals: dict[str, Movement] = {}
    dead: list[str] = []
    for number in range(STEPS if lora else 1):
        try:
            step.backward(job.model, [batch], job.loss, _scaler(job), precision=job.numbers)
            dead = alive.without_gradient(job.model) if number == 0 else dead
        except RunError as error:
            return failed(NAME, f"{error.what}, such as {error.got}", fix=_fix_dead(job, error.fix))
        except RuntimeError as error:
            if "does not require grad" not in str(error):  # torch's word for a loss that nothing trainable is in
                raise
            return failed(NAME, "the loss depends on nothing that is trained", fix=_fix_dead(job, TARGETS))
        for movement in moves(job, keep=lora):
            if movement.reached:
                totals[movement.name] = movement
        for parameter in job.model.parameters():
            parameter.grad = None
    return _verdict(job, totals, dead)


def moves(job: Job, *, keep: bool) -> Iterator[Movement]:
    """Take a step with each parameter alone, by its own group's rate; `keep` leaves it where it came to."""
    for group in optim.parameter_groups(job.model, job.config.train):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.grad is None:
                continue
            there = _stepped(job, parameter, group)
            reached = parameter.grad != 0
            yield Movement(
                name=name, reached=int(reached.sum()), moved=int(((there != parameter.detach()) & reached).sum())
            )
            if keep:
                with torch.no_grad():
                    parameter.copy_(there)


def _stepped(job: Job, parameter: nn.Parameter, group: dict[str, object]) -> Tensor:
    copy = nn.Parameter(parameter.detach().clone())
    assert parameter.grad is not None
    # AdamW's step does not depend on the gradient's length, but for eps: A's first gradients can be as small as that.
    copy.grad = parameter.grad / parameter.grad.abs().max().clamp(min=torch.finfo(parameter.dtype).tiny)
    alone = {"params": [copy], "lr": group["lr"], "weight_decay": group["weight_decay"]}
    optim.resident([alone], job.config.train).step()
    return copy.detach()


def _scaler(job: Job) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(job.numbers.device.type, enabled=False)


def _verdict(job: Job, totals: dict[str, Movement], dead: list[str]) -> Check:
    wanted = [name for name, p in job.model.named_parameters() if p.requires_grad]
    full = job.config.train.method == "full"
    still = [name for name in wanted if name not in totals]
    if dead and not full:
        return failed(
            NAME,
            f"{len(dead)} of {len(wanted)} trainable matrices get no gradient, such as {dead[0]}",
            fix=_fix_dead(job, TARGETS),
        )
    reached, moved = sum(m.reached for m in totals.values()), sum(m.moved for m in totals.values())
    share = moved / max(reached, 1)
    stalled = [name for name, m in totals.items() if m.moved < ENOUGH * m.reached]
    if stalled:
        return failed(
            NAME,
            f"{len(stalled)} of {len(wanted)} matrices stand still at train.lr={job.config.train.lr:g}: a step is "
            f"rounded away ({share:.1%} of entries move), such as in {stalled[0]}",
            fix="Raise train.lr: 1e-4 to 5e-4 is usual for LoRA from 1B parameters on, ten times that for small "
            "models, a tenth for all weights.",
        )
    if still and not full:
        return failed(
            NAME,
            f"{len(still)} of {len(wanted)} matrices have a gradient of zero when the others have moved",
            fix=f"Look at {still[0]}: it is trainable, and the loss does not depend on it.",
        )
    without = f"; {len(still)} got no gradient from these rows, such as {still[0]}" if still else ""
    return passed(NAME, f"{len(wanted) - len(still)} of {len(wanted)} matrices move ({share:.1%} of entries){without}")


def _fix_dead(job: Job, otherwise: str) -> str:
    if job.config.train.gradient_checkpointing:
        return (
            "Call model.enable_input_require_grads(), or set train.gradient_checkpointing=false: checkpointed layers "
            "whose input needs no gradient train nothing."
        )
    return otherwise
