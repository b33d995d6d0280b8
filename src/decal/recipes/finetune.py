"""Fine-tune a model on a data set: the whole job, from top to bottom."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from decal import rundir
from decal.data import prepare
from decal.data.batches import Batches, InOrder
from decal.data.ledger import Ledger
from decal.errors import ConfigError
from decal.evaluate.loss import Evaluation, evaluate
from decal.model.load import load_model, load_tokenizer
from decal.model.wrapper import get_peft_model
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import logs, loop, losses, manifest, precision, start, state


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a run gave. `result` is the folder of the adapter (or, after full fine-tuning, of the model)."""

    run: Path
    result: Path
    ledger: Ledger
    step: int  # the step whose weights were kept: the best evaluated one, without an evaluation the last
    steps: int
    loss: float | None  # of the last step on training data
    eval_before: float | None
    eval_loss: float | None  # at `step`
    trainable: int
    seconds: float


def finetune(
    config: RunConfig,
    *,
    resume: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    wrap: Callable[[nn.Module], nn.Module] = loop.identity,
) -> Finetuned:
    """Train an adapter (or the whole model) as `config` says, in the run folder `config.output`.

    With `resume` the run in that folder goes on from its last checkpoint; on a CPU it ends in the very bits it
    would have ended in. Raises DecalError for what the user can mend, Interrupted after Ctrl-C or SIGTERM.
    """
    began, train = time.perf_counter(), config.train

    # What can be refused is refused first: the folder, the device, a missing package; then the data, whose faults show
    # in seconds; then the weights.
    run = RunDir(Path(config.output))
    checkpoint = start.starting_point(run, config, resume=resume)
    logs.check_installed(train.log_to)
    device = precision.pick_device(train.device)
    numbers = precision.resolve(train.precision, device)

    random.seed(train.seed)
    np.random.seed(train.seed % 2**32)
    torch.manual_seed(train.seed)  # dropout, and nothing else: data and adapters have generators of their own

    tokenizer = load_tokenizer(config.model, revision=config.revision)
    data = prepare.prepare(config.data, tokenizer, seed=train.seed)
    batches = Batches(
        data.train,
        length=config.data.max_length,
        micro_batch=train.micro_batch,
        accumulate=train.accumulate,
        packing=config.data.packing,
        pad_id=data.pad_id,
        seed=train.seed,
    )
    loop.plan(train, batches.steps_per_epoch)

    # Full fine-tuning moves the weights themselves, which therefore are fp32; a frozen base stays as it is stored.
    full = train.method == "full"
    stored = torch.float32 if full or (train.precision == "fp32" and device.type != "cpu") else None
    model = load_model(config.model, dtype=stored, device=device, revision=config.revision)
    if full:
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, config.lora, generator=torch.Generator().manual_seed(train.seed))
    trainable, total = manifest.count(model)
    if trainable == 0:
        raise ConfigError("nothing is trainable", fix="Give lora.target_modules that train something.")
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    notes: list[str] = []
    loss = losses.LOSSES[train.loss](model, notes.append)
    measure: Callable[[nn.Module], Evaluation] | None = None
    if data.evaluation is not None:
        held_out = InOrder(
            data.evaluation,
            length=config.data.max_length,
            micro_batch=train.micro_batch,
            packing=config.data.packing,
            pad_id=data.pad_id,
        )
        measure = partial(evaluate, batches=held_out, loss=loss, autocast=numbers.autocast)

    # From here on the run exists.
    if resume:
        run.rewind(int(checkpoint.name.removeprefix("step-")) if checkpoint else -1)
    else:
        run.claim(config.to_yaml())
    facts = manifest.facts(config, device=device, precision=numbers, trainable=trainable, total=total)
    facts["data"] = data.ledger.to_dict()
    facts["evaluation"] = data.eval_ledger.to_dict() if data.eval_ledger else None
    run.write_manifest(facts)
    with logs.reporting(run, config, on_event) as report:
        if checkpoint is None:
            report("start", model=config.model, trainable=trainable, total=total, rows=data.ledger.used)
            for note in (*notes, *getattr(model, "notes", ())):
                report("note", text=note)
        progress = loop.train(
            model,
            batches,
            loss,
            train,
            run=run,
            precision=numbers,
            emit=report,
            evaluate=measure,
            save_adapter=None if full else model.save_pretrained,
            resume=checkpoint,
            wrap=wrap,
        )
        kept = progress.best_step or progress.step
        if kept != progress.step:
            state.load_trainable(run.path / rundir.CHECKPOINTS / f"step-{kept}", model)
            report("note", step=progress.step, text=f"the weights of step {kept} are kept: its evaluation was the best")
        result = run.model if full else run.adapter
        if data.template is not None:
            tokenizer.chat_template = data.template  # what the model was taught with is what it must be served with
        with rundir.new_folder(result) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        report("end", step=progress.step, kept=kept, path=str(result))

    seconds = time.perf_counter() - began
    run.write_manifest({**facts, **manifest.outcome(run, progress, kept=kept, seconds=seconds)})
    return Finetuned(
        run=run.path,
        result=result,
        ledger=data.ledger,
        step=kept,
        steps=progress.step,
        loss=manifest.last(run, "step", "loss"),
        eval_before=manifest.eval_loss(run, 0),
        eval_loss=manifest.eval_loss(run, kept),
        trainable=trainable,
        seconds=seconds,
    )
