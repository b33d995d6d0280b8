"""What is planned: the settings that decide a run's memory and time, as one value that can be varied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from decal.data.batch import Batch
from decal.spec import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig

Device = Literal["cpu", "cuda"]
Numbers = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One run: the model, what is trained of it, and the largest micro-batch that it will meet.

    `loss_rows` are the tokens of a micro-batch that are in the loss (None: all but one of each row), `packed` says
    that a row holds several samples, which takes a mask.
    """

    model: str
    lora: LoraConfig
    train: TrainConfig
    length: int
    packed: bool
    device: Device
    numbers: Numbers
    revision: str | None = None
    quantize: QuantConfig | None = None
    loss_rows: int | None = None
    eval_length: int | None = None  # None: as in training
    evaluates: bool = True

    @property
    def full(self) -> bool:
        return self.train.method == "full"

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch, padding included."""
        return self.length * self.train.micro_batch

    @property
    def stored_wide(self) -> bool:
        """Whether the weights are made fp32 as they are loaded."""
        return self.full or (self.numbers == "fp32" and self.device != "cpu")


def evaluates_on(data: DataConfig) -> bool:
    """Whether a run's settings name rows to evaluate on."""
    return bool(data.eval_rows or data.eval_path or data.eval_split)


def of_run(
    config: RunConfig,
    *,
    device: Device,
    numbers: Numbers,
    batch: Batch | None = None,
    eval_length: int | None = None,
    evaluates: bool = True,
) -> Wanted:
    """Return what a run's settings want: the largest micro-batch is `batch`, or as large as the settings allow."""
    found = Wanted(
        model=config.model,
        revision=config.revision,
        lora=config.lora,
        train=config.train,
        quantize=config.quantize,
        length=config.data.max_length,
        packed=config.data.packing,
        device=device,
        numbers=numbers,
        eval_length=eval_length,
        evaluates=evaluates,
    )
    if batch is None:
        return found
    rows, length = batch.input_ids.shape
    return replace(
        found,
        train=config.train.model_copy(update={"micro_batch": rows}),
        length=length,
        packed=batch.position_ids is not None,
        loss_rows=batch.loss_tokens,
    )
