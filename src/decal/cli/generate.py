"""`decal generate`: answer prompts, with the base and adapters side by side if asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from decal.cli import console
from decal.errors import DataError, DecalError
from decal.reading import parse_json, reading

if TYPE_CHECKING:
    from decal.recipes.compare import Variants

EXAMPLES = (
    "Examples:\n\n"
    'decal generate --adapter runs/first --prompt "Where is my parcel?" --compare\n\n'
    "decal generate --model Qwen/Qwen3-0.6B -a runs/a -a runs/b --file questions.txt --json"
)


def generate(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What the user says; may be repeated.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="One prompt a line, or rows of {prompt} or {messages}; - is stdin."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="Adapter or run folder, or hub id; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model (default: the one that the adapter names).")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", "-c", help="The base's reply beside each adapter's.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the text as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus of the probability that is drawn from.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**63 - 1)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda (default: cuda if there is one).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the replies as JSON.")] = False,
) -> None:
    """Answer prompts with a model, with adapters on it, or with all of them side by side."""
    from decal.cli import answering

    questions = read_questions(prompt or [], file)
    variants = answering.load(model, adapter or [], device=device)
    from decal.data.shapes import Turn
    from decal.evaluate.compare import Sampling
    from decal.layers.routing import BASE

    before = [] if system is None else [Turn(role="system", content=system)]
    texts = [
        variants.prompts.raw(question)
        if raw
        else variants.prompts.conversation([*before, Turn(role="user", content=question)])
        for question in questions
    ]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    names = [name for name in variants.labels if compare or len(variants.labels) == 1 or name != BASE]
    with console.working("answering"):
        replies = {variants.labels[name]: variants.answer(texts, name=name, sampling=sampling) for name in names}
    show(questions, replies, variants=variants, as_json=as_json)


def show(questions: list[str], replies: dict[str, list[str]], *, variants: Variants, as_json: bool) -> None:
    """Print the replies: alone for one variant, in columns for several."""
    if as_json:
        rows = [
            {"prompt": question, "replies": {label: said[i] for label, said in replies.items()}}
            for i, question in enumerate(questions)
        ]
        console.dump({"base": variants.base, "answers": rows})
        return
    if len(replies) > 1:
        console.show(columns(questions, replies))
        return
    (said,) = replies.values()
    if len(questions) == 1:
        console.say(said[0])
        return
    for question, reply in zip(questions, said, strict=True):
        console.say(f"> {question}", "dim")
        console.say(reply + "\n")


def columns(questions: list[str], replies: dict[str, list[str]]) -> Table:
    """Return a table with a column for each variant."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True, header_style="bold", expand=True)
    table.add_column("prompt", ratio=3, overflow="fold", style="dim")
    for label in replies:
        table.add_column(label, ratio=3, overflow="fold")
    for i, question in enumerate(questions):
        table.add_row(Text(question), *(Text(said[i].strip() or "(nothing)") for said in replies.values()))
    return table


def read_questions(prompts: list[str], file: str | None) -> list[str]:
    """Return all prompts of --prompt, --file and, if neither is given and something is piped in, stdin."""
    found = list(prompts)
    if file is not None:
        found += from_lines(sys.stdin.read() if file == "-" else read(Path(file)))
    if not found and file is None and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        found = [text] if text else []
    if not found:
        raise DecalError("no prompt is given", fix='Give --prompt "..." or --file FILE, or pipe a text in.')
    return found


def read(path: Path) -> str:
    if not path.is_file():
        raise DataError("no such prompt file", got=path, fix="Check the path.")
    with reading("the prompt file cannot be read", path, fix="Save it as UTF-8 text.", kind=DataError):
        return path.read_text(encoding="utf-8")


def from_lines(text: str) -> list[str]:
    """Return one prompt for each line: plain text, or a JSON object that holds a prompt or messages."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [one_line(line, number) for number, line in enumerate(lines, start=1)]


def one_line(line: str, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"line {number} is not JSON: {error}", fix="Correct it, or give plain text.") from None
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages = row.get("messages") if isinstance(row.get("messages"), list) else []
    said = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    if said and isinstance(said[0], str):
        return said[0]
    raise DataError(
        f"line {number} holds neither a prompt nor messages", got=", ".join(sorted(row))[:120], fix="Correct the row."
    )
