"""`decal bench`: how fast a training step is here, on random weights of a model's shape."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console
from decal.cli.train import Precision
from decal.errors import RunError
from decal.words import counted

if TYPE_CHECKING:
    from decal.recipes.bench import Bench

EXAMPLES = (
    "Examples:\n\n"
    "decal bench Qwen/Qwen3-0.6B --rows 4 --length 1024\n\n"
    "decal bench meta-llama/Llama-3.1-8B --quantize nf4 --recompute --peers"
)


UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


class Quantize(str, Enum):
    """How the frozen base is stored."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id; only its config is read.")],
    rows: Annotated[int, typer.Option(help="Rows in a step.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens in a row.", min=2)] = 2048,
    rank: Annotated[int, typer.Option(help="LoRA rank, on all linear layers.", min=1)] = 16,
    quantize: Annotated[Quantize | None, typer.Option(help="Store the frozen base in 4 or 8 bits.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute layers again in backward.")] = False,
    precision: Annotated[Precision, typer.Option(help="What is computed in, as in training.")] = Precision.auto,
    steps: Annotated[int, typer.Option(help="Steps to take the median of, after 4 of warm-up.", min=1)] = 6,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "auto",
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure PEFT, with Liger, and Unsloth on the same work, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time a training step: tokens per second, share of the machine's own rate, memory, and that it learns."""
    with console.working("measuring decal"):
        from decal.recipes import bench as recipe

        work = recipe.Work(
            model=model,
            rows=rows,
            length=length,
            rank=rank,
            quantize=None if quantize is None else quantize.value,
            recompute=recompute,
            precision=precision.value,
            steps=steps,
            device=device,
        )
        notes: list[str] = []
        found = [recipe.bench(work, notes.append)]
    for note in notes:
        console.note(note)
    not_measured: list[str] = []
    if peers:
        from decal.recipes import peers as others

        there, not_measured = others.installed(work)
        for name in there:
            try:
                with console.working(f"measuring {name}"):
                    found.append(replace(others.measure(work, name), flops=found[0].flops))
            except RunError as error:
                not_measured.append(str(error))
        for line in not_measured:
            console.note(f"not measured: {line}")
    if as_json:
        systems = [{**asdict(b), "utilisation": b.utilisation} for b in found]
        console.dump({"work": asdict(work), "systems": systems, "not_measured": not_measured})
        return
    console.show(table(found))
    one = found[0]
    product = "large 16-bit product" if one.precision == "fp8" else "large product"
    console.say(
        f"\n{one.device}, {one.precision}: a {product} runs at {operations(one.rate)}/s; "
        f"a step of {counted(work.tokens, 'token')} needs {operations(one.flops)}",
        "dim",
    )


def operations(number: float) -> str:
    """Return a number of operations in the largest unit of which there is one; three digits."""
    size, unit = next(((s, u) for s, u in UNITS if number >= s), UNITS[-1])
    value = number / size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def table(found: list[Bench]) -> Any:
    """Return a line for each system."""
    titles = ("tokens/s", "step", "use", "forward", "backward", "optimizer", "peak", "loss", "gradient")
    shown = console.plain_table("", *titles)
    for b in found:
        shown.add_row(
            b.system if b.precision == found[0].precision else f"{b.system}, {b.precision}",
            f"{b.tokens_per_s:,.0f}",
            f"{1e3 * b.seconds:,.0f} ms",
            f"{b.utilisation:.0%}",
            *(f"{1e3 * b.parts[part]:,.0f} ms" for part in ("forward", "backward", "optimizer")),
            "" if b.peak is None else f"{b.peak / 2**30:.2f} GiB",
            f"{b.first_loss:.3f} -> {b.last_loss:.3f}",
            f"{b.grad_norm:.3g}",
        )
    return shown
