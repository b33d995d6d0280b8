"""The sections of a run's settings: data, train and quantize. `decal.spec` puts them together and exports them.

Importing this file costs no torch; docs/settings.md is written from the descriptions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from decal.settings import Settings


class DataConfig(Settings):
    """Where the examples come from, how a row becomes tokens and which tokens are learnt."""

    path: str = Field(description="The rows: a file, a folder, or a data set on the hub (`owner/name[:config]`).")
    split: str = Field(default="train", description="Which split of a folder or a hub data set.")
    eval_path: str | None = Field(default=None, description="Rows to evaluate on, from elsewhere.")
    eval_split: str | None = Field(default=None, description="The split of `eval_path`, or of `path`, to evaluate on.")
    eval_rows: int = Field(
        default=0, ge=0, description="Training rows held out to evaluate on, without `eval_path` and `eval_split`."
    )
    shape: Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text", "template"] = Field(
        default="auto", description="What a row is ([data.md](data.md)); `auto`: the first row tells."
    )
    template: str | None = Field(
        default=None, description="`{{text}} -> {{label}}`: what stands before the last column is the prompt."
    )
    chat_template: str | None = Field(default=None, description="A Jinja file that replaces the tokenizer's own.")
    loss_on: Literal["assistant", "all"] = Field(default="assistant", description="Which tokens are learnt.")
    max_length: int = Field(default=1024, ge=8, description="Tokens in one row.")
    too_long: Literal["drop", "cut"] = Field(default="drop", description="What becomes of a longer row.")
    packing: bool = Field(default=True, description="Several samples in one row; none sees another.")
    streaming: bool = Field(default=False, description="Rows are read as they are needed; give `train.steps`, too.")
    limit: int | None = Field(default=None, ge=1, description="Only the first n rows.")


def _words(value: Any) -> Any:
    """One word, or words with commas between them, stands for a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Settings):
    """How the loop runs. The defaults are decal's own recommendations."""

    method: Literal["lora", "full"] = Field(default="lora", description="Train an adapter, or all weights.")
    loss: Literal["sft"] = Field(default="sft", description="Cross entropy of the learnt tokens.")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        default="adamw", description="AdamW; `8bit`: its states in 8 bits; `paged`: in host memory when a card is full."
    )
    lr: float = Field(default=2e-4, gt=0, description="The highest learning rate.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the data; a part of one is rounded up to steps.")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; overrides `epochs`.")
    micro_batch: int = Field(default=4, ge=1, description="Rows (packed: of `max_length` tokens) in one forward pass.")
    accumulate: int = Field(default=1, ge=1, description="Micro-batches whose gradients make one step.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up."
    )
    warmup: float = Field(
        default=0.03,
        ge=0,
        description="Steps on which the rate rises from 0: below 1 a share of all, rounded up, but never all; from 1 "
        "on a number, which must be smaller than that of all steps.",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's decay; biases, norms, DoRA's lengths have none."
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's beta1 and beta2, each below 1.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="A larger gradient is scaled down to this norm.")
    loraplus_lr_ratio: float | None = Field(
        default=None, gt=0, description="LoRA+: B learns this many times faster than A (16 is usual)."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        default="auto",
        description="What is computed in; `auto`: bf16 or fp16 on a GPU, fp32 elsewhere (few CPUs are quick at bf16); "
        "`fp8`: bf16 with the layers' products in 8-bit floats, faster on Hopper cards and less exact "
        "([performance.md](performance.md)).",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Layers are computed again in backward: less memory, more time, equal results."
    )
    check: bool = Field(
        default=True,
        description="Begin with a forecast ([plan.md](plan.md)), and a new run with the quick checks "
        "([checks.md](checks.md)): some seconds.",
    )
    memory: str | None = Field(
        default=None,
        description="A card's memory to spend and not to exceed, such as `8GiB`, or `free` for all that is free: "
        "decides what layers keep, in the place of `gradient_checkpointing`.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="On a card, steps of a shape that came twice are recorded and replayed: less time for small steps "
        "([performance.md](performance.md)).",
    )
    device: str = Field(default="auto", description="`cpu`, `cuda`, `cuda:1`; `auto`: a GPU if there is one.")
    seed: int = Field(default=0, description="Of the order of rows, held-out rows, the adapter's start and dropout.")
    eval_every: int | None = Field(default=None, ge=1, description="Steps between evaluations; null: an epoch.")
    save_every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; null: an epoch.")
    keep: int = Field(default=2, ge=1, description="Checkpoints kept beside the best one.")
    early_stopping: int | None = Field(
        default=None, ge=1, description="Stop after so many evaluations without a better loss."
    )
    auto_stop: bool = Field(
        default=False, description="Stop a diverged run and keep its best checkpoint ([watch.md](watch.md))."
    )
    log_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(_words)] = Field(
        default=[], description="Where events also go; one word or a list. Each must be installed."
    )


class QuantConfig(Settings):
    """How a frozen base is stored: 4-bit NF4 or FP4 in blocks, or 8-bit integers by row; its adapters stay fp32."""

    format: Literal["nf4", "fp4", "int8"] = Field(default="nf4", description="How each weight is stored.")
    double_quant: bool = Field(
        default=True, description="nf4, fp4: 8-bit scales; 4.127 bits per weight instead of 4.5."
    )
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="nf4, fp4: weights that share a scale."
    )
    head: Literal["wide", "nf4", "int8"] = Field(
        default="wide", description="How a frozen output head is stored; other than `wide` changes every logit."
    )
    skip: tuple[str, ...] = Field(
        default=(), description="Modules that stay wide, by name or last name, beside embeddings and head."
    )
    allow_dense: bool = Field(
        default=False, description="Go on where over 5% of the other parameters cannot be quantised."
    )

    def of_head(self) -> QuantConfig | None:
        """Return how the output head is stored; None: as it is."""
        return None if self.head == "wide" else self.model_copy(update={"format": self.head})

    @property
    def told(self) -> str:
        """Return the formats in words."""
        return self.format if self.head == "wide" else f"{self.format}, its output head in {self.head}"

    @property
    def has_files(self) -> bool:
        """Whether a model stored so can be written: bitsandbytes' layout has one 4-bit format for a model."""
        return self.format != "int8" and self.head in ("wide", self.format)
