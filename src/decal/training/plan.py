"""How long a run is and what happens after which step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from decal.errors import ConfigError
from decal.spec import TrainConfig
from decal.words import counted


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All counted in optimizer steps. `evaluates` says whether there is anything to evaluate on."""

    steps: int
    warmup: int
    save_every: int
    eval_every: int
    evaluates: bool

    def evaluation_due(self, step: int) -> bool:
        return self.evaluates and step > 0 and (step >= self.steps or step % self.eval_every == 0)

    def save_due(self, step: int) -> bool:
        return step >= self.steps or step % self.save_every == 0


def make(config: TrainConfig, *, steps_per_epoch: int | None, evaluates: bool) -> Plan:
    """Return the plan that the settings mean; `steps_per_epoch` is None for a stream of unknown length.

    Raises ConfigError for settings that would mean nothing: epochs of a stream, early stopping without evaluation, a
    warm-up that never ends.
    """
    if config.steps is not None:
        steps = config.steps
    elif steps_per_epoch is not None:
        steps = math.ceil(config.epochs * steps_per_epoch)
    else:
        raise ConfigError("a stream has no known length, so train.epochs means nothing", fix="Give train.steps.")
    for name in ("early_stopping", "eval_every"):
        if getattr(config, name) is not None and not evaluates:
            raise ConfigError(
                f"train.{name} needs an evaluation set", fix="Give data.eval_rows, data.eval_path or data.eval_split."
            )
    warmup = warmup_steps(config.warmup, steps)
    if warmup >= steps:
        raise ConfigError(
            "train.warmup is not shorter than the run, so the learning rate would never be reached",
            got=f"{warmup:,} of {counted(steps, 'step')}",
            fix="Give fewer warm-up steps, or a share of all steps below 1.",
        )
    epoch = steps_per_epoch or steps
    return Plan(
        steps=steps,
        warmup=warmup,
        save_every=config.save_every or epoch,
        eval_every=config.eval_every or epoch,
        evaluates=evaluates,
    )


def warmup_steps(warmup: float, steps: int) -> int:
    """Return how many steps warm up: below 1 a share of all steps, rounded up but never all, else a number of steps."""
    return min(math.ceil(warmup * steps), steps - 1) if warmup < 1 else int(warmup)
