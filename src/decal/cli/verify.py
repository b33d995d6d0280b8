"""`decal verify`: whether an adapter is what was sealed, and answers here as it did there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from decal.cli import console

if TYPE_CHECKING:
    from decal.files.compared import Part
    from decal.recipes.verify import Verified

EXAMPLES = "Examples:\n\ndecal verify runs/first\n\ndecal verify runs/first/adapter --base models/copy --json"
DIFFERS = 3  # exit code
STYLES = {"ok": "green", "differs": "bold red"}


def verify(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter or run folder, or hub id.")],
    base: Annotated[
        str | None, typer.Option("--base", "-m", help="Base model (default: the one that the adapter names).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda (default: cuda if there is one).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every part as JSON.")] = False,
) -> int:
    """Compare an adapter, its base, tokenizer and chat template with its seal (decal.json), and replay eight prompts.

    Exit code 3 if anything differs.
    """
    with console.working("loading the adapter on its base, and replaying its prompts"):
        from decal.recipes import verify as recipe

        found = recipe.verify(adapter, base=base, device=device)
    if as_json:
        facts = {"adapter": found.adapter, "base": found.base, "agrees": found.agrees, "notes": found.notes}
        replay = None if found.replay is None else asdict(found.replay)
        console.dump({**facts, "parts": [asdict(part) for part in found.parts], "replay": replay})
    else:
        show(found)
    return 0 if found.agrees else DIFFERS


def show(found: Verified) -> None:
    """Print a line for each part, then what to do about those that differ."""
    table = console.plain_table("part", "", "what was found", left=3)
    for part in found.parts:
        table.add_row(part.name, Text(part.state.value, style=STYLES.get(part.state.value, "dim")), Text(said(part)))
    console.show(table)
    for note in found.notes:
        console.note(f"note: {note}")
    wrong = [part for part in found.parts if part.state.value == "differs"]
    for fix in dict.fromkeys(part.fix for part in wrong):
        console.note(f"fix: {fix}", style=None)
    if wrong:
        console.say(f"{found.adapter} differs from its seal in {', '.join(part.name for part in wrong)}", "bold red")
    else:
        missing = [part.name for part in found.parts if part.state.value != "ok"]
        more = f"; unverified: {', '.join(missing)}" if missing else ""
        console.say(f"{found.adapter} is what was sealed{more}", "green")


def said(part: Part) -> str:
    """Return a part's finding, with what was found where it differs."""
    return part.says if part.got is None else f"{part.says} ({part.got})"
