"""A run before its first step: everything that can be refused has been, and nothing has been written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from decal.data import prepare as data_door
from decal.data.batches import Batches, InOrder
from decal.data.prepare import Prepared
from decal.data.samples import Samples
from decal.errors import ConfigError
from decal.model import quantized, rows
from decal.model.lean import require_fp8
from decal.model.load import load_model, load_tokenizer
from decal.model.wrapper import PeftModel
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import budget, logs, losses, plan, precision, start
from decal.training.losses import Loss
from decal.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run works on. `notes` say what was chosen, and what may well be a mistake."""

    config: RunConfig
    numbers: Precision
    tokenizer: Any
    data: Prepared
    batches: Batches
    held_out: InOrder | None
    model: Any
    loss: Loss
    notes: tuple[str, ...]


# Called when all but the weights is known: (settings, numbers, batches, held-out batches)
BeforeWeights = Callable[[RunConfig, Precision, Batches, InOrder | None], object]


def prepare(config: RunConfig, *, resumed: RunDir | None = None, before_weights: BeforeWeights | None = None) -> Job:
    """Return the job that the settings mean. Raises DecalError for whatever would not run.

    The cheapest is refused first: the device and a missing package; then the data, whose faults show in seconds (those
    of a `resumed` run must be the ones that it began with); then the weights. `before_weights` is told what is known
    until then.
    """
    logs.check_installed(config.train.log_to)
    if config.train.memory is not None:
        budget.parse(config.train.memory)
    numbers = precision.resolve(config.train.precision, precision.pick_device(config.train.device))
    seed_everything(config.train.seed)

    tokenizer = load_tokenizer(config.model, revision=config.revision)
    data = data_door.prepare(config.data, tokenizer, seed=config.train.seed)
    if resumed is not None:
        start.check_same_data(resumed, data.ledger.digest)
    batches, held_out = batch(config, data)
    plan.make(config.train, steps_per_epoch=batches.steps_per_epoch, evaluates=held_out is not None)

    if before_weights is not None:
        before_weights(config, numbers, batches, held_out)
    model = trainable_model(config, numbers)
    if numbers.fp8:
        require_fp8(model, numbers.dtype)
    notes = [*quantized.storage(model), *getattr(model, "notes", ()), *cautions(config, numbers)]
    loss = losses.LOSSES[config.train.loss](model, notes.append)
    if (missing := rows.check(model, tokenizer, data.train if isinstance(data.train, Samples) else ())) is not None:
        notes.append(missing)
    return Job(
        config=config,
        numbers=numbers,
        tokenizer=tokenizer,
        data=data,
        batches=batches,
        held_out=held_out,
        model=model,
        loss=loss,
        notes=tuple(notes),
    )


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


def cautions(config: RunConfig, numbers: Precision) -> list[str]:
    """Return what may well be a mistake, though it can be run."""
    notes: list[str] = []
    if config.train.precision == "bf16" and numbers.device.type == "cpu" and not precision.cpu_has_bf16():
        notes.append(
            "train.precision=bf16: this CPU has no instructions for it, which can make a run up to 22 times slower; "
            "train.precision=auto computes in fp32"
        )
    return notes
