"""`decal quickstart`: fine-tune the bundled model on made-up tickets, and see what it learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from decal.cli import console, imports

if TYPE_CHECKING:
    from decal.cli.watch import Watch
    from decal.recipes.quickstart import Quickstart

EXAMPLES = "Examples:\n\ndecal quickstart\n\ndecal quickstart --output runs/try train.lr=1e-3 lora.r=8"
DEFAULT = Path("runs/quickstart")


def quickstart(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to try.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Where all goes (default: {DEFAULT}, or the next free {DEFAULT}-2)."),
    ] = None,
    tickets: Annotated[int | None, typer.Option(help="Training tickets (default: the recipe's).", min=1)] = None,
    held_out: Annotated[int | None, typer.Option(help="Held-out tickets (default: the recipe's).", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Fine-tune the bundled 5.7 M parameter model to route support tickets, on a CPU, in a few minutes."""
    from decal.cli import overrides

    for word in words or []:
        overrides.check_key(word.partition("=")[0])
    folder = output or next_free(DEFAULT)
    with console.working("loading torch and transformers"), imports.at_rest():
        from decal.cli.watch import Watch
        from decal.recipes import quickstart as recipe

    config = recipe.settings(folder, words or [])
    with Watch(config) as watch:
        done = recipe.quickstart(
            folder,
            training=tickets or recipe.TRAINING,
            held_out=held_out or recipe.HELD_OUT,
            overrides=words or [],
            on_event=Stages(watch),
        )
    if as_json:
        console.dump(plain(done))
    else:
        show(done)


def next_free(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3, ... that is not there."""
    number, found = 2, folder
    while found.exists():
        found, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return found


class Stages:
    """Shows what happens around the training run, and hands the run's own events on."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "stage":
            self._watch.stage(event["text"])
        elif event["kind"] == "answered":
            self._watch.count(event["done"], event["of"])
        else:
            self._watch(event)


def show(done: Quickstart) -> None:
    """Print the measurements, four answers, and what to do next."""
    from decal.cli.generate import columns
    from decal.cli.watch import clock, folder_bytes, megabytes

    asked = len(done.after.answers)
    trained = done.finetuned
    console.say("")
    pairs = done.shown
    replies = {"base": [b.reply for b, _ in pairs], "tuned": [a.reply for _, a in pairs]}
    console.show(columns([b.question for b, _ in pairs], {**replies, "wanted": [b.wanted for b, _ in pairs]}))
    baseline = (
        "scikit-learn is not installed"
        if done.baseline is None
        else f"{done.baseline:.1%} (TF-IDF + logistic regression)"
    )
    adapter = trained.result
    lines = {
        "right before": f"{done.before.accuracy:.1%} of {asked} held-out tickets",
        "right after": f"{done.after.accuracy:.1%}, free answers, the whole route exactly",
        "classical": baseline,
        "trained": f"{trained.trainable:,} of {done.total:,} parameters ({trained.trainable / done.total:.2%})",
        "adapter": f"{adapter} ({megabytes(folder_bytes(adapter))})",
        "time": f"{clock(done.seconds)}, {clock(trained.seconds)} of it training",
        "next": f'decal generate --adapter {adapter} --prompt "Where is my parcel?" --compare\n'
        f"decal chat --adapter {adapter}\n"
        f"decal train --model {trained_model(done)} --data YOUR.jsonl --output runs/mine",
    }
    console.out().print(console.facts(lines), soft_wrap=True)
    verdict(done)


def verdict(done: Quickstart) -> None:
    """Say plainly whether it worked."""
    from decal.recipes.quickstart import EXPECTED_BEFORE, WANTED_AFTER

    if not done.reached:
        console.warn(f"the tuned model should reach {WANTED_AFTER:.0%} and did not: {done.after.accuracy:.1%}")
    if done.before.accuracy > EXPECTED_BEFORE:
        console.warn(f"the base model should know at most {EXPECTED_BEFORE:.0%}; it knew {done.before.accuracy:.1%}")
    if done.reached:
        console.out().print(Text("It worked.", style="bold green"))


def trained_model(done: Quickstart) -> str:
    """Return the base as a path that can be typed."""
    from decal.bundled import MODEL_DIR

    return str(MODEL_DIR)


def plain(done: Quickstart) -> dict[str, Any]:
    """Return the measurements as plain values for JSON."""
    from decal.cli.watch import folder_bytes

    return {
        "accuracy_before": done.before.accuracy,
        "accuracy_after": done.after.accuracy,
        "accuracy_classical": done.baseline,
        "held_out": len(done.after.answers),
        "trainable": done.finetuned.trainable,
        "total": done.total,
        "adapter": str(done.finetuned.result),
        "adapter_bytes": folder_bytes(done.finetuned.result),
        "seconds": round(done.seconds, 1),
        "training_seconds": done.finetuned.seconds,
        "reached": done.reached,
        "shown": [{"prompt": b.question, "wanted": b.wanted, "base": b.reply, "tuned": a.reply} for b, a in done.shown],
    }
