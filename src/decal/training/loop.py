"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from decal.data.batch import Batch
from decal.errors import ConfigError, RunError
from decal.rundir import RunDir
from decal.spec import TrainConfig
from decal.training import optim, state
from decal.training.interrupt import Interrupted, listening
from decal.training.losses import Loss
from decal.training.precision import Precision
from decal.training.step import StepResult, take_step


class Emit(Protocol):
    """Where progress goes: `emit("step", step=3, loss=1.2)`."""

    def __call__(self, kind: str, **fields: Any) -> object: ...


class TrainingBatches(state.Resumable, Protocol):
    """An endless source of accumulated batches that knows its position."""

    @property
    def steps_per_epoch(self) -> int | None: ...

    def __iter__(self) -> Iterator[tuple[Batch, ...]]: ...


class Measured(Protocol):
    """What an evaluation gives."""

    @property
    def loss(self) -> float: ...

    @property
    def perplexity(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """After which steps what is done; all counted in optimizer steps."""

    steps: int
    eval_every: int
    save_every: int
    warmup: int


def plan(config: TrainConfig, steps_per_epoch: int | None) -> Plan:
    """Return the plan that the settings mean for data of this length (None: a stream of unknown length)."""
    if steps_per_epoch is None and config.steps is None:
        raise ConfigError("a stream has no known length, so epochs mean nothing", fix="Give train.steps.")
    steps = config.steps or math.ceil(config.epochs * (steps_per_epoch or 0))
    epoch = steps_per_epoch or steps
    return Plan(
        steps=steps,
        eval_every=config.eval_every or epoch,
        save_every=config.save_every or epoch,
        warmup=optim.warmup_steps(config.warmup, steps),
    )


def identity(model: nn.Module) -> nn.Module:
    """Return the model as it is: one process needs no sharding."""
    return model


def train(
    model: nn.Module,
    batches: TrainingBatches,
    loss: Loss,
    config: TrainConfig,
    *,
    run: RunDir,
    precision: Precision,
    emit: Emit,
    evaluate: Callable[[nn.Module], Measured] | None = None,
    save_adapter: Callable[[Path], object] | None = None,
    resume: Path | None = None,
    wrap: Callable[[nn.Module], nn.Module] = identity,
) -> state.Progress:
    """Train the model's trainable parameters in place and return how far it came.

    `resume` is a checkpoint to go on from; `evaluate` measures the model on held-out data. Raises Interrupted after
    a signal, once the step under way is saved; RunError if nothing can be learnt or the loss is not finite.
    """
    model = wrap(model)
    job = state.Training(
        model=model,
        optimizer=optim.build(model, config),
        scaler=precision.scaler(),
        batches=batches,
        progress=state.Progress(),
    )
    todo, done = plan(config, batches.steps_per_epoch), job.progress
    if resume is not None:
        state.load(resume, job)
    elif evaluate is not None:
        _evaluate(job, evaluate, emit)
    model.train()
    with listening() as stop:
        for group in batches:
            if done.step >= todo.steps:
                break
            began = time.perf_counter()
            share = optim.SCHEDULES[config.schedule](done.step, todo.warmup, todo.steps)
            optim.set_lr(job.optimizer, share)
            result = take_step(
                model,
                group,
                loss,
                job.optimizer,
                job.scaler,
                precision=precision,
                max_grad_norm=config.max_grad_norm,
            )
            _count(done, result, time.perf_counter() - began)
            emit("step", **_step_fields(done, result, config.lr * share, todo, time.perf_counter() - began))
            last = done.step == todo.steps
            better = False
            if evaluate is not None and (last or done.step % todo.eval_every == 0):
                better = _evaluate(job, evaluate, emit)
            enough = config.early_stopping is not None and done.evaluations_since_best >= config.early_stopping
            if better or last or enough or stop.asked or done.step % todo.save_every == 0:
                path = state.save(run, job, save_adapter)
                run.prune(keep=config.keep, best=done.best_step)
                emit("save", step=done.step, checkpoint=path.name)
            if stop.asked and not last:
                raise Interrupted(step=done.step, run=run.path)
            if enough:
                emit(
                    "note", step=done.step, text=f"stopped early: no better loss in {config.early_stopping} evaluations"
                )
                break
    return done


def _count(done: state.Progress, result: StepResult, seconds: float) -> None:
    done.step += 1
    done.tokens += result.tokens
    done.loss_tokens += result.count
    done.seconds += seconds
    done.skipped = done.skipped + 1 if result.skipped else 0
    if done.skipped >= 20:
        raise RunError(
            "the fp16 gradient overflowed in 20 steps on end, so nothing is learnt",
            fix="Use train.precision=bf16 or fp32.",
        )


def _step_fields(done: state.Progress, result: StepResult, lr: float, todo: Plan, seconds: float) -> dict[str, Any]:
    return {
        "step": done.step,
        "steps": todo.steps,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "loss_tokens": result.count,
        "tokens": result.tokens,
        "tokens_per_s": round(result.tokens / seconds, 1),
        "seconds_left": round(done.seconds / done.step * (todo.steps - done.step), 1),
    }


def _evaluate(job: state.Training, evaluate: Callable[[nn.Module], Measured], emit: Emit) -> bool:
    """Measure, and return whether a trained step has never been better."""
    done = job.progress
    measured = evaluate(job.model)
    better = done.step > 0 and (done.best_loss is None or measured.loss < done.best_loss)
    if better:
        done.best_loss, done.best_step, done.evaluations_since_best = measured.loss, done.step, 0
    elif done.step > 0:
        done.evaluations_since_best += 1
    emit("eval", step=done.step, loss=measured.loss, perplexity=measured.perplexity, best=better)
    return better
