"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from decal.data.batch import Batch
from decal.errors import RunError
from decal.rundir import RunDir
from decal.spec import TrainConfig
from decal.training import alive, halving, not_finite, optim, plan, state, stopping
from decal.training.budget import Budget
from decal.training.graphs import Graphs
from decal.training.interrupt import Interrupted, listening
from decal.training.losses import Loss
from decal.training.paged import Paged
from decal.training.plan import Plan
from decal.training.precision import Precision
from decal.training.state import Progress
from decal.training.step import Backward, NotFinite, StepResult, backward, take_step
from decal.training.watch import Advice, Watch
from decal.words import counted

OVERFLOWS = 20  # fp16: a scale that is still too large after halving 20 times will not be found


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
    budget: Budget | None = None,
    decode: not_finite.Decode | None = None,
) -> Progress:
    """Train the model's trainable parameters in place and return how far it came.

    `evaluate` measures the model on held-out data; `save_adapter` adds the adapter's own format to each checkpoint;
    `resume` is a checkpoint to go on from, `budget` bounds a card's memory, `decode` makes text of token ids. Raises
    Interrupted after a signal, once the step under way is saved; RunError if nothing can be learnt or the loss is not
    finite. With `train.auto_stop` a run that diverges ends there, and `stopped` and `kept` of what is returned say why
    and with which weights.
    """
    model = wrap(model)
    todo = plan.make(config, steps_per_epoch=batches.steps_per_epoch, evaluates=evaluate is not None)
    done, scaler = Progress(), precision.scaler()
    optimizer = optim.build(model, config, say=lambda text: emit("note", text=text))
    graphs = Graphs(precision, say=lambda text: emit("note", text=text))
    note = partial(_note, done, emit)
    way = _way_back(config, graphs, budget, optimizer, done, note) if wrap is identity else backward
    step = partial(take_step, precision=precision, limit=config.max_grad_norm, run=way)
    keep_rows = partial(not_finite.write, run, model=model, loss=loss, precision=precision, decode=decode)
    job = state.Training(model=model, optimizer=optimizer, scaler=scaler, batches=batches, progress=done)
    if resume is not None:
        _load(resume, job, budget)
    first = done.step
    model.train()
    watch = Watch(model, optimizer, config, done.watch, warmup=todo.warmup)
    _advise(watch.begin(), first, emit)
    with listening() as stop:
        if evaluate is not None and (first == 0 or _owed(done, todo)):
            _evaluate(done, stop.unless_asked(partial(evaluate, model)), watch, emit)
            if first > 0:
                _save(run, job, config, save_adapter, emit)
        clock = time.perf_counter()
        for group in batches:
            if done.step >= todo.steps or _enough(done, config):  # a resumed run may have been at its end
                break
            share = optim.SCHEDULES[config.schedule](done.step, todo.warmup, todo.steps)
            optim.set_lr(optimizer, share)
            inspect = partial(_say_dead, model, emit) if done.step == first else None
            with _diverging(run, watch, done, config, precision, partial(keep_rows, done.step + 1, group), emit):
                result = step(model, group, loss, optimizer, scaler, inspect=inspect)
            if done.stopped:
                break
            if budget is not None:
                budget.stepped(graphs.forget)
            _count(done, result, time.perf_counter() - clock)
            emit("step", **_fields(done, result, config.lr * share, todo, time.perf_counter() - clock))
            _advise(watch.step(done.step, result, share=share), done.step, emit)
            better = False
            if evaluate is not None and _owed(done, todo):
                better = _evaluate(done, stop.unless_asked(partial(evaluate, model)), watch, emit)
            if config.auto_stop and watch.diverged is not None:
                stopping.stop(run, done, watch, since=watch.diverged, why=watch.reason)
                break
            if better or stop.asked or _enough(done, config) or todo.save_due(done.step):
                _save(run, job, config, save_adapter, emit, prune=not (config.auto_stop and watch.suspicious))
            if stop.asked:
                break
            clock = time.perf_counter()
    if stop.asked and not done.stopped and (done.step < todo.steps or _owed(done, todo)):
        raise Interrupted(step=done.step, run=run.path)
    _say_stopped(run, done, config, emit)
    return done


def _say_stopped(run: RunDir, done: Progress, config: TrainConfig, emit: Emit) -> None:
    """Say why a run ended before its time. Raises RunError if nothing of it is kept."""
    if done.stopped:
        emit("stop", step=done.step, kept=done.kept, text=done.stopped)
        stopping.refuse_nothing(run, done, lr=config.lr)
    elif _enough(done, config):
        worse = counted(done.worse, "evaluation")
        emit("note", step=done.step, text=f"stopped early: {worse} without a better loss")


def _way_back(
    config: TrainConfig,
    graphs: Graphs,
    budget: Budget | None,
    optimizer: torch.optim.Optimizer,
    done: Progress,
    note: Callable[[str], object],
) -> Backward:
    """Return how gradients come about in a process alone: launched or replayed, within a budget, in parts that fit."""
    # A paged optimizer looks at the card's memory in every backward pass, which a replay would not let it do.
    run = graphs.backward if config.cuda_graphs and not isinstance(optimizer, Paged) else backward
    if budget is not None:
        run = budget.guarded(run, graphs.forget)
    return halving.guarded(run, done, say=note, forget=partial(_halved, graphs, budget))


def _load(checkpoint: Path, job: state.Training, budget: Budget | None) -> None:
    state.load(checkpoint, job)
    if budget is not None:
        budget.tokens = -(-budget.tokens // job.progress.cut)


def _halved(graphs: Graphs, budget: Budget | None) -> None:
    graphs.forget()
    if budget is not None:
        budget.halved()


def _note(done: Progress, emit: Emit, text: str) -> None:
    """Note something about the step under way."""
    emit("note", step=done.step + 1, text=text)


def _owed(done: Progress, todo: Plan) -> bool:
    """Whether this step is to be evaluated and has not been (a signal may have come between)."""
    return todo.evaluation_due(done.step) and done.evaluated != done.step


def _enough(done: Progress, config: TrainConfig) -> bool:
    return config.early_stopping is not None and done.worse >= config.early_stopping


def _advise(advice: Iterable[Advice], step: int, emit: Emit) -> None:
    for one in advice:
        emit("advice", step=step, advice=one.kind, text=one.text)


def _evaluate(done: Progress, measured: Measured | None, watch: Watch, emit: Emit) -> bool:
    """Note an evaluation (None: broken off), and return whether no trained step has ever been better."""
    if measured is None:
        return False
    better = done.step > 0 and (done.best_loss is None or measured.loss < done.best_loss)
    if better:
        done.best_loss, done.best_step, done.worse = measured.loss, done.step, 0
    elif done.step > 0:
        done.worse += 1
    done.evaluated = done.step
    emit("eval", step=done.step, loss=measured.loss, perplexity=measured.perplexity, best=better)
    _advise(watch.evaluation(done.step, measured.loss), done.step, emit)
    return better


def _save(
    run: RunDir,
    job: state.Training,
    config: TrainConfig,
    save_adapter: Callable[[Path], object] | None,
    emit: Emit,
    *,
    prune: bool = True,
) -> None:
    path = state.save(run, job, save_adapter)
    if prune:
        spare = int(config.auto_stop)  # what a divergence is seen by comes after the last good checkpoint
        run.prune(keep=config.keep + spare, best=job.progress.best_step)
    emit("save", step=job.progress.step, checkpoint=path.name)


@contextmanager
def _diverging(
    run: RunDir,
    watch: Watch,
    done: Progress,
    config: TrainConfig,
    precision: Precision,
    keep_rows: Callable[[], str],
    emit: Emit,
) -> Iterator[None]:
    """Let the error of a step that is not finite say what fits this run: what to change, and what is left of it.

    `keep_rows` writes the step's rows down and says where. With `auto_stop` there is no error while a checkpoint from
    before is left: `done` says then that the run stopped.
    """
    try:
        yield
    except NotFinite as error:
        rows = keep_rows()
        _note(done, emit, rows)
        since = watch.began_badly or done.step + 1
        if config.auto_stop:
            stopping.stop(run, done, watch, since=since, why=f"the {error.name} of step {done.step + 1} was not finite")
            if done.kept is not None:
                return
            emit("stop", step=done.step, kept=None, text=done.stopped)  # the error below says more of what to change
        narrow = precision.name != "fp32"
        if done.step > 0:
            change = "Lower train.lr or use train.precision=fp32" if narrow else "Lower train.lr"
        else:
            cause = f"{precision.name} overflows (try train.precision=fp32) or" if narrow else "most likely"
            change = f"No weight had moved yet, so train.lr is not the cause: {cause} the model's weights hold NaN"
        whole = run.checkpoints()
        left = (
            f"The last whole checkpoint is {whole[-1].name}; other settings need a new --output"
            if whole
            else f"No checkpoint was written: delete {run.path} before you start again there"
        )
        raise NotFinite(error.name, error.value, fix=f"{change}. {rows}. {left}.") from None


def _say_dead(model: nn.Module, emit: Emit) -> None:
    names = alive.without_gradient(model)
    if names:
        some = ", ".join(names[:3])
        emit(
            "note",
            text=f"no gradient on the first step for {counted(len(names), 'trainable parameter')}, such as {some}",
        )


def _count(done: Progress, result: StepResult, seconds: float) -> None:
    done.step += 1
    done.tokens += result.tokens
    done.loss_tokens += result.count
    done.seconds += seconds
    done.skipped = done.skipped + 1 if result.skipped else 0
    if done.skipped >= OVERFLOWS:
        raise RunError(
            f"the fp16 gradient overflowed in {OVERFLOWS} steps on end, so nothing is learnt",
            fix="Use train.precision=bf16 or fp32.",
        )


def _fields(done: Progress, result: StepResult, lr: float, todo: Plan, seconds: float) -> dict[str, Any]:
    fields = {
        "step": done.step,
        "steps": todo.steps,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "loss_tokens": result.count,
        "tokens": result.tokens,
        "seconds": round(seconds, 4),
        "tokens_per_s": round(result.tokens / seconds, 1),
        "seconds_left": round(done.seconds / done.step * (todo.steps - done.step), 1),
    }
    return {**fields, "skipped": True} if result.skipped else fields
