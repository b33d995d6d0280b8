"""`decal plan`: what a run will take, before anything is downloaded."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console, imports
from decal.errors import ConfigError

if TYPE_CHECKING:
    from decal.planning.cards import Card
    from decal.planning.epoch import Read
    from decal.planning.time import Epoch
    from decal.planning.wanted import Wanted
    from decal.spec import RunConfig

EXAMPLES = (
    "Examples:\n\n"
    "decal plan Qwen/Qwen3-8B --gpu 24GiB --method qlora --seq 4096\n\n"
    "decal plan run.yaml --card h100 --rows 20000\n\n"
    "decal plan --table"
)
NO_DATA = "rows.jsonl"  # a plan of a model needs no data; a run's settings do


class Method(str, Enum):
    """What is trained, and on what."""

    lora = "lora"
    qlora = "qlora"
    full = "full"


class Device(str, Enum):
    """Where the run will be."""

    cpu = "cpu"
    cuda = "cuda"


def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|RUN.yaml KEY=VALUE",
            help="A folder or hub id, of which only the config is read, or a settings file; settings go over both.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="The card's memory: 24GiB (2^30) or 24GB (10^9).")] = None,
    card: Annotated[str | None, typer.Option(help="The card, for memory and time: h100, a100-80, rtx4090, ...")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that it keeps up in 16-bit products.", min=0.01)] = None,
    method: Annotated[Method | None, typer.Option(help="lora, qlora (4-bit base) or full (default: lora).")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in one row (default: 1024).", min=1)] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows in one forward pass (default: 4).", min=1)] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches to one step (default: 1).", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank (default: 16).")] = None,
    targets: Annotated[str | None, typer.Option(help="Layers, as in decal train (default: all-linear).")] = None,
    optimizer: Annotated[str | None, typer.Option(help="As in decal train (default: adamw).")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Layers are computed twice.")] = False,
    rows: Annotated[int | None, typer.Option(help="Rows of an epoch, packed full, for its time.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of an epoch, for its time.", min=1)] = None,
    device: Annotated[Device | None, typer.Option(help="cpu or cuda (default: as this machine; --gpu: cuda).")] = None,
    table: Annotated[bool, typer.Option("--table", help="7B, 13B, 70B x full, LoRA, QLoRA; no model is read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a run will take in memory and time, whether it fits, and what would make it fit."""
    from decal.cli import overrides, planned

    if table:
        planned.show_classic(as_json=as_json)
        return
    room = _room(gpu)
    settings = {
        "train.method": None if method is None else method.value.removeprefix("q"),
        "quantize": "nf4" if method is Method.qlora else None,
        "data.max_length": seq,
        "train.micro_batch": micro_batch,
        "train.accumulate": accumulate,
        "lora.r": rank,
        "lora.target_modules": overrides.target_names(targets),
        "train.optimizer": optimizer,
        "train.gradient_checkpointing": True if checkpointing else None,
    }
    config = read(words or [], settings)
    with console.working("counting a step without weights"):
        with imports.at_rest():
            from decal.planning import answer
        known = _card(card, tflops)
        data = _data(config)
        wanted, room = _wanted(config, device, room, known, data)
        known = known or _here(wanted)
        epoch = _epoch(data, tokens, rows, wanted.length)
        done = answer.plan(wanted, room=room, card=known, epoch=epoch)
    if as_json:
        console.dump(done.to_dict())
    else:
        planned.show(done, known, no_epoch=data if epoch is None and isinstance(data, str) else None)


def _data(config: RunConfig) -> Read | str:
    """Return the data of a run's settings, or why an epoch is not known."""
    if config.data.path == NO_DATA:
        return "no data are named"
    from decal.planning import epoch

    return epoch.read(config)


def _epoch(data: Read | str, tokens: int | None, rows: int | None, length: int) -> Epoch | None:
    from decal.planning.time import Epoch

    if tokens is not None or rows is not None:
        return Epoch(tokens=tokens or (rows or 0) * length)
    return None if isinstance(data, str) else data.epoch()


def _room(gpu: str | None) -> int | None:
    from decal.planning import sizes

    return None if gpu is None else sizes.read(gpu)


def read(words: list[str], settings: dict[str, Any]) -> RunConfig:
    """Return the settings that the words and options mean; a model's name stands for a run without data."""
    from decal.cli import overrides

    plain = [word for word in words if "=" not in word]
    if not plain:
        raise ConfigError("nothing to plan", fix="Give a model or a settings file, or --table. See: decal plan --help")
    if plain[0].endswith((".yaml", ".yml")) or (Path(plain[0]) / "run.yaml").is_file():
        return overrides.read(words, settings, resume=False)
    if len(plain) > 1:
        raise ConfigError("more than one model", got=" ".join(plain), fix="Give one; write settings as key=value.")
    rest = [word for word in words if "=" in word]
    return overrides.read(rest, {"model": plain[0], "data.path": NO_DATA, **settings}, resume=False)


def _card(name: str | None, tflops: float | None) -> Card | None:
    from decal.planning import cards

    if name is not None:
        return cards.find(name)
    if tflops is None:
        return None
    # About what cards have for each TFLOP/s that they keep up: an H100's 2,880 GB/s for 640.
    return cards.Card(name=f"{tflops:g} TFLOP/s", memory=0, tflops=tflops, bandwidth=4.5 * tflops, source="--tflops")


def _wanted(
    config: RunConfig, device: Device | None, room: int | None, card: Card | None, data: Read | str
) -> tuple[Wanted, int | None]:
    """Return what is planned and the room there is: what was given, the card's, or this machine's."""
    import psutil
    import torch

    from decal.planning import wanted

    if device is None:
        named = config.train.device.partition(":")[0]
        on_card = room is not None or card is not None or named == "cuda" or torch.cuda.is_available()
        on_card = on_card and named != "cpu"
        device = Device.cuda if on_card else Device.cpu
    if device is Device.cpu:
        room = room or psutil.virtual_memory().available
        numbers: Any = "bf16" if config.train.precision == "bf16" else "fp32"
    else:
        if room is None and card is not None and card.memory:
            room = int(card.memory * 2**30)
        elif room is None and torch.cuda.is_available():
            room = torch.cuda.get_device_properties(0).total_memory
        old = card is not None and card.name == "t4"  # no bf16
        auto = "fp16" if old else "bf16"
        numbers = {"auto": auto, "fp8": "bf16"}.get(config.train.precision, config.train.precision)
    there = None if isinstance(data, str) else data
    held_out = None if there is None else there.held_out
    asked = wanted.of_run(
        config,
        device=device.value,
        numbers=numbers,
        batch=None if there is None else there.batches.largest(),
        eval_length=None if held_out is None else held_out.longest(),
        evaluates=config.data.path == NO_DATA or wanted.evaluates_on(config.data),
    )
    return asked, room


def _here(wanted: Wanted) -> Card | None:
    """Return this machine's rates where the plan is for it."""
    import torch

    from decal.planning import cards

    if wanted.device == "cpu":
        return cards.measured(torch.device("cpu"))
    if torch.cuda.is_available():
        return cards.measured(torch.device("cuda"), torch.bfloat16)
    return None
