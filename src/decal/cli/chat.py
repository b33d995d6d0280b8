"""`decal chat`: a conversation with a model and its adapter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from decal.cli import console

if TYPE_CHECKING:
    from decal.evaluate.compare import Sampling
    from decal.recipes.compare import Variants

EXAMPLES = (
    "Examples:\n\ndecal chat --adapter runs/first\n\nprintf 'Hello\\nWhere is my parcel?\\n' | decal chat -a runs/first"
)
HELP = "/base and /adapter change who answers, /new starts again, /quit (or Ctrl-D) ends"


def chat(
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="Adapter or run folder, or hub id.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model (default: the one that the adapter names).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda (default: cuda if there is one).")] = None,
) -> None:
    """Talk with a model over several turns. Piped in, each line is one turn, and only the replies are printed."""
    from decal.cli import answering

    variants = answering.load(model, [adapter] if adapter else [], device=device)
    from decal.evaluate.compare import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    terminal = sys.stdin.isatty()
    if terminal:
        console.note(f"{variants.base}{' + ' + adapter if adapter else ''}; {HELP}")
    converse(variants, system=system, sampling=sampling, terminal=terminal)


def converse(variants: Variants, *, system: str | None, sampling: Sampling, terminal: bool) -> None:
    """Read turns until the input ends."""
    from decal.data.shapes import Turn
    from decal.layers.routing import BASE

    before = [] if system is None else [Turn(role="system", content=system)]
    turns = list(before)
    adapter = list(variants.labels)[-1]
    name = adapter
    while True:
        try:
            said = input("you> " if terminal else "").strip()
        except EOFError:
            break
        if said in ("/quit", "/exit"):
            break
        if said in ("/base", "/adapter"):
            name = BASE if said == "/base" else adapter
            console.note(f"now {variants.labels[name]} answers")
        elif said == "/new":
            turns = list(before)
            console.note("a new conversation")
        elif said.startswith("/"):
            console.note(HELP)
        elif said:
            turns.append(Turn(role="user", content=said))
            (reply,) = variants.answer([variants.prompts.conversation(turns)], name=name, sampling=sampling)
            turns.append(Turn(role="assistant", content=reply))
            console.say((f"{variants.labels[name]}> " if terminal else "") + reply.strip())
