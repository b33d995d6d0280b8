"""`decal quantize`: store a model in 4 bits and measure what that costs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console

if TYPE_CHECKING:
    from decal.recipes.quantize import Quantized

EXAMPLES = (
    "Examples:\n\n"
    "decal quantize Qwen/Qwen3-0.6B qwen-nf4 --report\n\n"
    "decal quantize Qwen/Qwen3-0.6B --format fp4 --report"
)
SHOWN = 12


class Head(str, Enum):
    """What the output head becomes."""

    wide = "wide"
    nf4 = "nf4"
    int8 = "int8"


class Format(str, Enum):
    """What the linear layers become."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id, in 16 or 32 bits.")],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The new model's folder (default: only measure).", show_default=False),
    ] = None,
    format: Annotated[Format, typer.Option(help="Of the linear layers.")] = Format.nf4,
    block: Annotated[int, typer.Option(help="Weights that share a scale: 32 to 4096.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Store the scales in 8 bits.")] = True,
    head: Annotated[Head, typer.Option(help="Of an output head of its own; wide: as it is.")] = Head.wide,
    skip: Annotated[
        list[str] | None, typer.Option(help="A module that stays as it is, by name or any part of it (repeatable).")
    ] = None,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Go on where over 5% of the parameters cannot be coded.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Show each layer's error; beside OUT also JSON and SVG.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all measurements as JSON.")] = False,
) -> None:
    """Quantise a model to 4 bits, in the layout that transformers and bitsandbytes read, and measure the error."""
    from decal.spec import QuantConfig

    given: dict[str, Any] = {"format": format.value, "block": block, "double_quant": double_quant}
    given |= {"head": head.value, "skip": tuple(skip or ()), "allow_dense": allow_dense}
    settings = QuantConfig(**given)
    with console.working("quantising"):
        from decal.recipes import quantize as recipe
        from decal.report import quantization

        result = recipe.quantize(model, out, settings, report=report)
    if as_json:
        console.dump(quantization.facts(result))
        return
    if report:
        show_layers(result)
    show(result)


def show(result: Quantized) -> None:
    """Print the sums."""
    from decal.cli.watch import megabytes

    wide = ", ".join(result.wide) or "none"
    single, double = f"{result.bits_single:.3f}", f"{result.bits_double:.3f}"
    lines = {
        "model": str(result.path) if result.path else "not written: give OUT",
        "format": f"{result.format}, {result.bits:.3f} bits per weight"
        + ("" if result.format == "int8" else f" ({single} with fp32 scales, {double} with double quantization)"),
        "coded": f"{result.coded:,} weights; as before: embeddings, norms, and {wide}",
        "size": f"{megabytes(result.bytes)} in memory",
        "error": f"{result.error:.2%} of the weights' norm",
    }
    if result.path is not None:
        lines["next"] = f"decal train --model {result.path} --data YOUR.jsonl"
    console.out().print(console.facts(lines), soft_wrap=True)


def show_layers(result: Quantized) -> None:
    """Print the layers that lose most, and how often each level is used."""
    table = console.plain_table("layer", "weights", "error", "worst block", "gain at 8 bits")
    for layer in sorted(result.layers, key=lambda layer: -layer.gain)[:SHOWN]:
        numbers = (f"{layer.weights:,}", f"{layer.error:.2%}", f"{layer.worst_block:.1%}", f"{layer.gain:.2f}x")
        table.add_row(layer.name, *numbers)
    console.show(table)
    left = len(result.layers) - SHOWN
    console.say(
        "gain: squared error that a byte more per weight removes there, against the mean"
        + (f"; {left} more layers" if left > 0 else "")
        + "\n",
        style="dim",
    )
    if layers := [layer for layer in result.layers if layer.levels]:
        weights = sum(layer.weights for layer in layers)
        shares = [sum(layer.levels[i] * layer.weights for layer in layers) / weights for i in range(16)]
        console.say(
            "levels   " + " ".join(f"{100 * share:.1f}" for share in shares) + "  (% of the weights, lowest first)"
        )
