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
from decal.data.prepare import Prepared
from decal.errors import ConfigError
from decal.evaluate.loss import evaluate
from decal.layers.adapted import Adapted
from decal.model import quantized
from decal.model.lean import lean
from decal.model.load import load_model, load_tokenizer
from decal.model.wrapper import PeftModel
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import logs, loop, losses, manifest, plan, precision, start, state
from decal.training.precision import Precision

LARGE_SCALE = 64  # of an adapter's change; 1 to 4 is usual


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
    # What can be refused is refused first: the folder, the device, a missing package; then the data, whose faults show
    # in seconds; then the weights. A run that fails here leaves nothing behind.
    config = RunConfig(**config.model_dump())  # our own, checked anew: config.lora may have been changed
    began = time.perf_counter()
    run = RunDir(Path(config.output))
    checkpoint = start.starting_point(run, config, resume=resume)
    logs.check_installed(config.train.log_to)
    numbers = precision.resolve(config.train.precision, precision.pick_device(config.train.device))
    seed_everything(config.train.seed)

    tokenizer = load_tokenizer(config.model, revision=config.revision)
    data = prepare.prepare(config.data, tokenizer, seed=config.train.seed)
    if resume:
        start.check_same_data(run, data.ledger.digest)
    batches, held_out = batch(config, data)
    plan.make(config.train, steps_per_epoch=batches.steps_per_epoch, evaluates=held_out is not None)

    model = trainable_model(config, numbers)
    notes = [*quantized.storage(model), *getattr(model, "notes", ()), *cautions(config, numbers, model)]
    loss = losses.LOSSES[config.train.loss](model, notes.append)
    measure = (
        partial(evaluate, batches=held_out, loss=loss, autocast=numbers.autocast) if held_out is not None else None
    )
    facts = manifest.facts(config, numbers, model, ledger=data.ledger, eval_ledger=data.eval_ledger)

    start.open_folder(run, config, facts, checkpoint=checkpoint, resume=resume)  # from here on the run exists
    with logs.reporting(run, config, on_event) as report:
        report("resume" if checkpoint else "start", model=config.model, **facts["parameters"])
        for note in () if checkpoint else notes:
            report("note", text=note)
        with lean(model):  # equal results, less kept for backward
            progress = loop.train(
                model,
                batches,
                loss,
                config.train,
                run=run,
                precision=numbers,
                emit=report,
                evaluate=measure,
                save_adapter=model.save_pretrained if config.train.method == "lora" else None,
                resume=checkpoint,
                wrap=wrap,
            )
        kept = state.keep_best(run, progress, model)
        if kept != progress.step:
            report("note", step=progress.step, text=f"kept the weights of step {kept}: its evaluation was the best")
        result = save(run.adapter if config.train.method == "lora" else run.model, model, tokenizer, data, config)
        report("end", step=progress.step, kept=kept, path=str(result))
    outcome = manifest.outcome(run, progress, kept=kept, seconds=time.perf_counter() - began)
    run.write_manifest({**facts, "outcome": outcome})
    return summary(run, result, data.ledger, facts["parameters"]["trainable"], outcome)


def seed_everything(seed: int) -> None:
    """Seed the global generators, from which dropout draws; data and adapters have generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def batch(config: RunConfig, data: Prepared) -> tuple[Batches, InOrder | None]:
    """Return the batches to train on and those to evaluate on."""
    shape: dict[str, Any] = {
        "length": config.data.max_length,
        "micro_batch": config.train.micro_batch,
        "packing": config.data.packing,
        "pad_id": data.pad_id,
    }
    training = Batches(data.train, accumulate=config.train.accumulate, seed=config.train.seed, **shape)
    return training, InOrder(data.evaluation, **shape) if data.evaluation is not None else None


def trainable_model(config: RunConfig, numbers: Precision) -> Any:
    """Return the model with what is to be trained, and nothing else, requiring gradients."""
    train, device = config.train, numbers.device
    # Full fine-tuning moves the weights themselves, so they are fp32; a frozen base stays as it is stored.
    wide = train.method == "full" or (numbers.name == "fp32" and device.type != "cpu")
    model: Any = load_model(
        config.model,
        dtype=torch.float32 if wide else None,
        device=device,
        revision=config.revision,
        quantize=config.quantize,
    )
    if train.method == "lora":
        model = PeftModel(model, config.lora, generator=torch.Generator().manual_seed(train.seed))
    else:
        model.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "nothing is trainable, so training would change nothing",
            fix="Set lora.inference_mode to false and give lora.target_modules.",
        )
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def cautions(config: RunConfig, numbers: Precision, model: nn.Module) -> list[str]:
    """Return what may well be a mistake, though it can be run."""
    notes: list[str] = []
    scales = [scale for layer in model.modules() if isinstance(layer, Adapted) for scale in layer.scaling.values()]
    if scales and max(scales) > LARGE_SCALE:
        rule = "lora_alpha / sqrt(r)" if config.lora.use_rslora else "lora_alpha / r"
        notes.append(
            f"the adapter's scale, {rule}, is {max(scales):,.0f}: 1 to 4 is usual, and one so large may diverge"
        )
    if config.train.precision == "bf16" and numbers.device.type == "cpu" and not precision.cpu_has_bf16():
        notes.append(
            "train.precision=bf16: this CPU has no instructions for it, which can make a run up to 22 times slower; "
            "train.precision=auto computes in fp32"
        )
    return notes


def save(folder: Path, model: Any, tokenizer: Any, data: Prepared, config: RunConfig) -> Path:
    """Write the adapter (or model) with the tokenizer and chat template that it must be served with."""
    if data.template is not None:
        tokenizer.chat_template = data.template
    with rundir.new_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
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
    )
