"""Whether a few rows can be learnt by heart: if not even that, nothing larger will work, and there is a reason."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from decal.checks import frozen_head, rows
from decal.checks.result import Check, failed, passed
from decal.data import pack
from decal.data.mask import Sample
from decal.spec import RunConfig
from decal.training import optim
from decal.training.job import Job
from decal.training.step import NotFinite, take_step
from decal.words import counted

NAME = "overfit"
TARGET = 0.05  # a loss at which every token is as good as certain: exp(-0.05) = 95% each
STEPS = 40
COIN_TOSS = 0.1  # of the loss that contradictions force on every token: more than that is noise in the data
FASTER = 10.0  # than train.lr
CAP = {"lora": 5e-3, "full": 1e-3}  # what FASTER may raise the rate to: beyond it healthy runs diverge, too
BOOST = {"lora": 2e-3, "full": 1e-3}  # what a lower rate is raised to where it has not done its work
BOOST_AFTER = 15  # steps in which the rate has shown whether it learns
UNDONE = 0.1  # of the loss: with more than this left the rate is raised, to tell slow from broken
SLOW = 0.9  # of the loss: a rate ten times as high that leaves more than this in BOOST_AFTER steps is too low
DIVERGED = 1.5  # times the loss at the start
WARMUP = 3
LEVEL = 8  # steps in which the loss has not fallen by 1%: it has come to where it will stay
HALF, FALLING = 0.6, 0.95  # of the start, of LEVEL steps ago: many tokens, or a small model, and nothing is wrong
NEAR = 1.25  # of the frozen head's floor: the last quarter takes as many steps as all before


@dataclass(frozen=True, kw_only=True)
class Course:
    """How the loss went: one value for each step, the rate that it began at and the one that it was raised to.

    `floor` is the least that the frozen head allows at the end.
    """

    losses: tuple[float, ...]
    rate: float
    boosted: float | None
    broke: bool  # the loss or its gradient became NaN or infinite
    floor: float

    @property
    def best(self) -> float:
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.inf)


def check(job: Job, seen: Sequence[Sample], samples: Sequence[Sample]) -> Check:
    """Train on `samples` alone, without weight decay and dropout, until their loss is near zero. Call it inside
    `untouched`. `seen` are the rows from which they were chosen."""
    learnt = sum(len(rows.learnt(sample)) for sample in samples)
    if not samples or learnt == 0:
        return failed(NAME, "no row has a token to learn", fix="Look at the rows above: the loss mask is empty.")
    if all(set(rows.learnt(sample)) <= set(job.data.stop_ids) for sample in samples):
        return failed(
            NAME,
            f"the {learnt} learnt tokens are stop tokens alone: the mask leaves the replies out",
            fix="Look at the rows above; give another data.chat_template, or data.loss_on=all.",
        )
    floor, clashing = contradictions(seen)
    if floor > COIN_TOSS:
        return failed(
            NAME,
            f"{clashing:,} of {len(seen):,} rows ask what another row asks and get another reply: no model can bring "
            f"their loss under {floor:.2f}",
            fix="Give the prompts what tells these rows apart, or keep one reply for each prompt.",
        )
    course = learn(job, samples)
    return verdict(
        course, lr=job.config.train.lr, what=f"{counted(len(samples), 'row')}, {counted(learnt, 'learnt token')}"
    )


def contradictions(samples: Sequence[Sample]) -> tuple[float, int]:
    """Return the lowest mean loss that any model can have on the replies, and how many rows contradict another.

    Where equal tokens are followed by unlike ones, the best a model can do is their frequencies. Rows without a prompt
    (plain text) do not count: that texts begin in different ways contradicts nothing.
    """
    asked: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    learnt = 0
    for sample in samples:
        question = rows.prompt(sample)
        if len(question) > 1:
            asked[question].append(tuple(rows.learnt(sample)))
            learnt += len(asked[question][-1])
    clashing = [replies for replies in asked.values() if len(set(replies)) > 1]
    least = sum(_least(replies) for replies in clashing)
    return least / max(learnt, 1), sum(len(replies) for replies in clashing)


def _least(replies: Sequence[tuple[int, ...]]) -> float:
    """Return the summed loss of the best guesses for several replies to one prompt."""
    following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for reply in replies:
        for at, token in enumerate(reply):
            following[reply[:at]][token] += 1
    return -sum(n * math.log(n / sum(c.values())) for c in following.values() for n in c.values())


def learn(job: Job, samples: Sequence[Sample]) -> Course:
    """Take up to STEPS steps on all samples together and return how the loss went."""
    config = job.config.train.model_copy(update={"weight_decay": 0.0, "loraplus_lr_ratio": None})
    batch = pack.collate([[sample] for sample in samples], pad_id=job.data.pad_id)
    optimizer, scaler = optim.build(job.model, config), job.numbers.scaler()
    rate, boost = first_rate(job.config), BOOST[config.method]
    boosted: float | None = None
    losses: list[float] = []
    broke = False
    _drop_nothing(job.model)
    while len(losses) < STEPS and not broke and (not losses or losses[-1] >= TARGET):
        warm = min(1.0, (len(losses) + 1 - (BOOST_AFTER if boosted else 0)) / WARMUP)
        optim.set_lr(optimizer, (boosted or rate) / config.lr * warm)
        try:
            result = take_step(
                job.model, [batch], job.loss, optimizer, scaler, precision=job.numbers, limit=config.max_grad_norm
            )
            losses.append(result.loss)
        except NotFinite:
            broke = True
        if len(losses) == BOOST_AFTER and UNDONE * losses[0] < losses[-1] < DIVERGED * losses[0] and rate < boost:
            boosted = boost
        if len(losses) >= BOOST_AFTER + LEVEL and min(losses[-LEVEL:]) > 0.99 * min(losses[:-LEVEL]):
            break
    return Course(
        losses=tuple(losses), rate=rate, boosted=boosted, broke=broke, floor=frozen_head.least_loss(job, batch)
    )


def first_rate(config: RunConfig) -> float:
    """Return ten times the run's rate, up to what is safe; a rate that is itself beyond that stays as it is."""
    return max(config.train.lr, min(FASTER * config.train.lr, CAP[config.train.method]))


def _drop_nothing(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def verdict(course: Course, *, lr: float, what: str) -> Check:
    """Say what a course means; `what` was learnt at the run's rate `lr`."""
    start = course.losses[0] if course.losses else math.nan
    measure = f"{what}: loss {start:.2f} -> {course.best:.3f} in {counted(len(course.losses), 'step')}"
    best, early = course.best, min(course.losses[:BOOST_AFTER], default=math.inf)
    fell = best < SLOW * start
    if course.broke or max(course.losses, default=0.0) > DIVERGED * max(start, 1.0):
        return failed(NAME, f"{measure}, diverging at a rate of {course.rate:g}", fix=f"Lower train.lr (now {lr:g}).")
    if course.boosted and fell and early > SLOW * start:
        return failed(
            NAME,
            f"{what}: {BOOST_AFTER} steps at {course.rate:g} took the loss from {start:.2f} to {early:.2f}, "
            f"then {len(course.losses) - BOOST_AFTER} at {course.boosted:g} to {best:.2f}: the rate is too low",
            fix=f"Raise train.lr (now {lr:g}).",
        )
    if best < TARGET:
        return passed(NAME, measure)
    if fell and best < NEAR * course.floor + TARGET:
        return passed(NAME, f"{measure}; the frozen head allows little less")
    if best < HALF * start and best < FALLING * min(course.losses[:-LEVEL], default=0.0):
        return passed(NAME, f"{measure}, and falling")
    if fell:
        return failed(
            NAME,
            f"{measure}: learning, but not to near zero",
            fix=f"Raise train.lr (now {lr:g}) or lora.r, or widen lora.target_modules: the rows ask for more.",
        )
    return failed(
        NAME,
        f"{measure}: nothing is learnt at a rate of {course.boosted or course.rate:g}",
        fix=f"Lower train.lr (now {lr:g})."
        if course.rate > CAP["lora"]
        else "Widen lora.target_modules: what is trained hardly changes the model's answers.",
    )
