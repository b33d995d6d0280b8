"""`decal train`: fine-tune from a settings file, or from a model and data."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from decal.cli import console, imports

EXAMPLES = (
    "Examples:\n\n"
    "decal train --model Qwen/Qwen3-0.6B --data chats.jsonl --eval-rows 100 --output runs/first\n\n"
    "decal train run.yaml train.lr=1e-4 lora.r=32\n\n"
    "decal train runs/first/run.yaml --resume"
)


class Method(str, Enum):
    """What is trained: a LoRA adapter, or all weights."""

    lora = "lora"
    full = "full"


class Optimizer(str, Enum):
    """How AdamW holds its states: fp32 or 8 bits; paged, in host memory while the card is short."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"
    paged_adamw = "paged_adamw"
    paged_adamw8bit = "paged_adamw8bit"


class Precision(str, Enum):
    """What products are computed in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN.yaml KEY=VALUE",
            help="A settings file, and settings that go over it.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base model: a folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Training rows: a file, folder or hub id.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Run folder (default: runs/decal).")] = None,
    method: Annotated[Method | None, typer.Option(help="Train an adapter or all weights (default: lora).")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank (default: 16).")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha (default: 2 x rank).")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout (default: 0).")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Layers: all-linear, attention, names (q_proj,v_proj), a regex (default: all-linear)."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default: 2e-4).")] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help="adamw, adamw8bit, paged_adamw, paged_adamw8bit (default: adamw).")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows in one forward pass (default: 4).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens in one row (default: 1024).")] = None,
    eval_rows: Annotated[int | None, typer.Option(help="Rows held out to measure on (default: 0).")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Rows to measure on, from elsewhere.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Store the frozen base in 4 or 8 bits: nf4, fp4, int8 (default: as it is).")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="auto, fp32, bf16, fp16; fp8 on Hopper and later (default: auto).")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="A card's memory to spend, never to exceed: 8GiB, or free for all that is.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random (default: 0).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: auto).")] = None,
    auto_stop: Annotated[
        bool, typer.Option("--auto-stop", help="Stop a run that diverges and keep its best checkpoint.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Fine-tune a model on your rows and write the adapter in PEFT's format."""
    from decal.cli import overrides

    config = overrides.read(
        words or [],
        {
            "model": model,
            "data.path": data,
            "output": output,
            "train.method": None if method is None else method.value,
            "lora.r": rank,
            "lora.lora_alpha": alpha,
            "lora.lora_dropout": dropout,
            "lora.target_modules": overrides.target_names(targets),
            "train.lr": lr,
            "train.optimizer": None if optimizer is None else optimizer.value,
            "train.epochs": epochs,
            "train.steps": steps,
            "train.micro_batch": micro_batch,
            "data.max_length": max_length,
            "data.eval_rows": eval_rows,
            "data.eval_path": eval_data,
            "quantize": quantize,
            "train.precision": None if precision is None else precision.value,
            "train.memory": memory,
            "train.seed": seed,
            "train.device": device,
            "train.auto_stop": True if auto_stop else None,
        },
        resume=resume,
    )
    with console.working("loading torch and transformers"), imports.at_rest():
        from decal.cli.watch import Watch, outcome
        from decal.recipes.finetune import finetune

    with Watch(config) as watch:
        done = finetune(config, resume=resume, on_event=watch)
    outcome(config, done, as_json=as_json)
