"""`decal check`: does this run learn what it should, before it is started?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console, imports
from decal.words import counted

if TYPE_CHECKING:
    from rich.text import Text

    from decal.checks.preview import Row
    from decal.checks.result import Check
    from decal.checks.resume import Short

EXAMPLES = (
    "Examples:\n\n"
    "decal check run.yaml\n\n"
    "decal check --model Qwen/Qwen3-0.6B --data chats.jsonl --rows 5\n\n"
    "decal check run.yaml --resume"
)
FAILED = 3  # the exit code when a check failed; 2 is for what could not be checked at all
STYLES = {"read": "dim", "learnt": "bold green", "stop": "bold black on green", "special": "cyan", "gap": "yellow"}
MARKS = {"learnt": ("[[", "]]"), "stop": ("{{", "}}"), "gap": (" ... ", " tokens ... ")}  # where there is no colour
SIGNS = {"passed": ("passed", "green"), "failed": ("FAILED", "bold red"), "not applicable": ("-", "dim")}


def check(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN.yaml KEY=VALUE", help="A settings file, and settings that go over it.", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base model: a folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Training rows: a file, folder or hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: auto).")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show as the model sees them.")] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Prove that a killed run goes on as if nothing had been.")
    ] = False,
    steps: Annotated[int, typer.Option(min=2, help="With --resume: steps of the proof.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and checks as JSON.")] = False,
) -> None:
    """Show what a run would learn, and try whether it does: exit code 3 if a check failed."""
    from decal.cli import overrides

    config = overrides.read(words or [], {"model": model, "data.path": data, "train.device": device}, resume=False)
    with console.working("loading torch and transformers"), imports.at_rest():
        from decal.recipes import check as recipe
    changed: list[tuple[str, str]] = []
    if resume:

        def on_short(short: Short) -> None:
            changed.extend(short.changed)
            if not as_json:
                console.note(f"short form of the run, in a temporary folder: {short.says()}")

        with console.working(f"training {steps} steps, killing it, going on"):
            found: list[Check] = [recipe.check_resume(config, steps=steps, on_short=on_short)]
        shown: list[Row] = []
        if not as_json:
            answer(found[0])
    else:
        quiet = as_json
        with console.working("reading the data and the model"):
            done = recipe.check(
                config,
                rows=rows,
                on_rows=None if quiet else preview,
                on_check=None if quiet else answer,
            )
        found, shown = list(done.checks), list(done.rows)
    bad = [one for one in found if one.status == "failed"]
    if as_json:
        told = {"rows": [row_fields(row) for row in shown], "checks": [one.fields() for one in found]}
        console.dump({**told, "changed": [{"settings": what, "why": why} for what, why in changed]} if resume else told)
    else:
        console.say(summary(found), style="bold red" if bad else "bold green")
    if bad:
        raise typer.Exit(FAILED)


def preview(rows: list[Row]) -> None:
    """Print rows: what is learnt stands out, in colour or in brackets."""
    from rich.text import Text

    colour = console.out().color_system is not None
    if not rows:
        return
    legend = Text.assemble(("read, not learnt  ", "dim" if colour else ""))
    for kind, words in (("learnt", "learnt"), ("stop", "learnt stop token"), ("special", "special token")):
        legend.append_text(marked(kind, words, colour=colour)).append("  ")
    console.out().print(legend, soft_wrap=True)
    for number, row in enumerate(rows, start=1):
        console.out().print(Text(f"\nrow {number}: {counts(row)}", style="bold"), soft_wrap=True)
        for sample in row.samples:
            line = Text.assemble(("| ", "blue"))  # a style given to Text itself would colour all that follows
            for place, piece in enumerate(sample, start=1):
                own = piece.text.rstrip("\n") if place == len(sample) else piece.text
                text = visible(own).replace("\n", "\u21b5\n  ")
                line.append_text(marked(piece.kind, text, colour=colour))
            console.out().print(line, soft_wrap=True)
        if row.packed > len(row.samples):
            console.say(f"| ... {counted(row.packed - len(row.samples), 'more sample')}", style="blue")
    console.say("")


def visible(text: str) -> str:
    """Return text of unknown origin without what would move a cursor or colour a terminal: controls become `?`."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text.replace("\r", ""))


def marked(kind: str, text: str, *, colour: bool) -> Text:
    """Return a piece of a row in its colour, or between its marks."""
    from rich.text import Text

    if kind == "gap":
        text = f" ... {text} tokens ... " if colour else text
    before, after = ("", "") if colour else MARKS.get(kind, ("", ""))
    return Text(f"{before}{text}{after}", style=STYLES[kind] if colour else "")


def counts(row: Row) -> str:
    """Return a row's numbers in words."""
    samples = f"{counted(row.packed, 'sample')}, " if row.packed > 1 else ""
    padding = f", then {row.padding:,} of padding" if row.padding else ""
    return f"{samples}{counted(row.tokens, 'token')}, {row.learnt:,} learnt{padding}"


def answer(check: Check, *, width: int = 14) -> None:
    """Print what one check found: a line, and the fix where it failed."""
    from rich.text import Text

    word, style = SIGNS[check.status]
    console.out().print(
        Text.assemble((f"{word:<8}", style), (f"{check.name:<{width}}", "bold"), check.measure), soft_wrap=True
    )
    if check.fix is not None:
        console.out().print(Text.assemble(" " * 8, ("fix: ", "bold"), check.fix), soft_wrap=True)


def summary(checks: list[Check]) -> str:
    """Return how many checks passed, and how long they took."""
    number = {status: sum(one.status == status for one in checks) for status in SIGNS}
    parts = [f"{number['passed']} passed"]
    parts += [f"{number['failed']} failed"] if number["failed"] else []
    parts += [f"{number['not applicable']} not applicable"] if number["not applicable"] else []
    return f"{', '.join(parts)} in {sum(one.seconds for one in checks):.1f} s"


def row_fields(row: Row) -> dict[str, Any]:
    """Return a row as plain values."""
    samples = [[{"kind": piece.kind, "text": piece.text} for piece in sample] for sample in row.samples]
    numbers = {"samples": row.packed, "tokens": row.tokens, "learnt": row.learnt, "padding": row.padding}
    return {**numbers, "shown": samples}
