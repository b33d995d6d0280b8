"""Fine-tune a model on a data set: the whole job, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from decal import rundir
from decal.checks import preflight, rows
from decal.checks.result import require
from decal.data.batches import Batches, InOrder
from decal.data.ledger import Ledger
from decal.errors import DecalError
from decal.evaluate import coded_head
from decal.evaluate.coded_head import HeadInCodes
from decal.evaluate.loss import evaluate
from decal.model.lean import general_note, lean
from decal.planning import budgeted
from decal.planning.grading import Grader, wanted_of
from decal.recipes import verify
from decal.report import run as page
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import budget, logs, loop, manifest, start, state
from decal.training.job import Job, prepare
from decal.training.loop import Measured
from decal.training.precision import Precision
from decal.training.state import Progress


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a run gave. `result` is the folder of the adapter (or, after full fine-tuning, of the model)."""

    run: Path
    result: Path
    ledger: Ledger
    steps: int
    step: int  # whose weights were kept: the best evaluated one; without an evaluation the last
    loss: float | None  # of the last step, on training data
    eval_before: float | None
    eval_loss: float | None  # at `step`
    trainable: int
    seconds: float
    stopped: str | None = None  # why `train.auto_stop` ended the run


def finetune(
    config: RunConfig,
    *,
    resume: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    wrap: Callable[[nn.Module], nn.Module] = loop.identity,
) -> Finetuned:
    """Train an adapter (or the whole model) as `config` says, in the run folder `config.output`.

    With `resume` the run in that folder goes on from its last checkpoint; on a CPU it ends in the very bits it would
    have ended in. Raises DecalError for what the user can mend, Interrupted after Ctrl-C or SIGTERM.
    """
    config = RunConfig(**config.model_dump())  # our own, checked anew: config.lora may have been changed
    began = time.perf_counter()
    run = RunDir(Path(config.output))
    checkpoint = start.starting_point(run, config, resume=resume)
    grader = Grader()
    job = prepare(config, resumed=run if resume else None, before_weights=partial(look_ahead, grader))
    checked = preflight.short(job) if config.train.check and not resume else []
    require(checked)
    head = change_of_head(job)
    facts = {**manifest.facts(job), "output_head": None if head is None else head.facts()}

    start.open_folder(run, config, facts, checkpoint=checkpoint, resume=resume)  # from here on the run exists
    with page.at_the_end(run), logs.reporting(run, config, on_event) as report:
        report("resume" if checkpoint else "start", model=config.model, **facts["parameters"])
        for check in checked:
            report("check", **check.fields())
        said = () if head is None else (str(head),)
        for note in () if checkpoint else (*job.notes, *said, *grader.notes):
            report("note", text=note)
        grader.begin()
        progress = train(job, run, report, checkpoint=checkpoint, wrap=wrap)
        graded = grader.grade([event for event in run.events() if event["kind"] == "step"])
        if graded is not None:
            report("plan", step=progress.step, **graded)
        kept = state.keep_best(run, progress, job.model)
        if kept != progress.step and not progress.stopped:
            report("note", step=progress.step, text=f"kept the weights of step {kept}: its evaluation was the best")
        result = save(run.adapter if config.train.method == "lora" else run.model, job)
        report("end", step=progress.step, kept=kept, path=str(result))
        outcome = manifest.outcome(run, progress, kept=kept, seconds=time.perf_counter() - began)
        run.write_manifest({**facts, "plan": graded, "outcome": outcome})
    return summary(run, result, job.data.ledger, facts["parameters"]["trainable"], outcome)


def look_ahead(
    grader: Grader, config: RunConfig, numbers: Precision, batches: Batches, held_out: InOrder | None
) -> None:
    """Foresee what the run takes. Raises ConfigError where it is beyond its budget of memory whatever is given up."""
    if config.train.check:
        grader.foresee(config, numbers, batches, held_out)
    if config.train.memory is not None and numbers.device.type == "cuda":
        try:
            limit = budget.limit_of(config.train.memory, numbers.device)
            budgeted.refuse_too_small(wanted_of(config, numbers, batches, held_out), limit)
        except DecalError:
            raise
        except Exception as error:  # a forecast that cannot be made stops no run
            grader.notes.append(f"whether the budget can be met is not known ({type(error).__name__}: {error})")


def train(
    job: Job,
    run: RunDir,
    report: logs.Report,
    *,
    checkpoint: Path | None,
    wrap: Callable[[nn.Module], nn.Module],
) -> Progress:
    """Run the training loop on the lean forms of the model's layers, within the budget of memory where there is one."""
    config, device = job.config, job.numbers.device
    on_host = budget.wants_embedding_on_host(job.model, config, device)
    tokens = budget.tokens_of(config, None if config.train.memory is None else job.batches.largest())

    def note(text: str) -> None:
        report("note", text=text)

    with (
        lean(job.model, embedding_on_host=on_host, fp8=job.numbers.fp8),  # less kept for backward
        budget.spent(job.model, config, job.numbers, tokens=tokens, say=note) as spend,
    ):
        if (slower := general_note(job.model, job.numbers.dtype)) is not None:
            note(slower)
        return loop.train(
            job.model,
            job.batches,
            job.loss,
            config.train,
            run=run,
            precision=job.numbers,
            emit=report,
            evaluate=measure(job),
            save_adapter=job.model.save_pretrained if config.train.method == "lora" else None,
            resume=checkpoint,
            wrap=wrap,
            budget=spend,
            decode=job.tokenizer.decode,
        )


def change_of_head(job: Job) -> HeadInCodes | None:
    """Return what storing the output head in codes changes on the first row of the data; None for a head as it was."""
    config = job.config
    if config.quantize is None or config.quantize.head == "wide":
        return None
    return coded_head.change(job.model, config.model, config.revision, rows.looked_at(job)[0].ids)


def measure(job: Job) -> Callable[[nn.Module], Measured] | None:
    """Return what measures the model on the held-out rows; None where there are none."""
    if job.held_out is None:
        return None
    return partial(evaluate, batches=job.held_out, loss=job.loss, autocast=job.numbers.autocast)


def save(folder: Path, job: Job) -> Path:
    """Write the adapter (or model) with the tokenizer and chat template that it must be served with."""
    if job.data.template is not None:
        job.tokenizer.chat_template = job.data.template
    with rundir.new_folder(folder) as new:
        job.model.save_pretrained(new)
        job.tokenizer.save_pretrained(new)
        if job.config.train.method == "lora":
            verify.complete(new, job.model, job.tokenizer, job.data.ledger)
    return folder


def summary(run: RunDir, result: Path, ledger: Ledger, trainable: int, outcome: dict[str, Any]) -> Finetuned:
    """Return what the manifest says about the outcome as a typed value."""
    return Finetuned(
        run=run.path,
        result=result,
        ledger=ledger,
        steps=outcome["steps"],
        step=outcome["kept_step"],
        loss=outcome["loss"],
        eval_before=outcome["eval_loss_before"],
        eval_loss=outcome["eval_loss"],
        trainable=trainable,
        seconds=outcome["seconds"],
        stopped=outcome["stopped"],
    )
