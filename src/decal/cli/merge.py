"""`decal merge`: write base + adapter as one plain model, and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decal.cli import console
from decal.words import counted

if TYPE_CHECKING:
    from rich.table import Table

    from decal.recipes.merge import Candidate, Merged

EXAMPLES = (
    "Examples:\n\ndecal merge runs/first/adapter --out merged\n\ndecal merge runs/first --out merged --dtype fp32"
)


class Dtype(str, Enum):
    """What the merged weights are written in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Into(str, Enum):
    """What the change is added to and how the sum is written."""

    auto = "auto"
    sixteen_bit = "16bit"
    dequantized = "dequantized"
    nf4 = "nf4"


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter or run folder, or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new model's folder.")],
    base: Annotated[
        str | None, typer.Option("--base", "-m", help="Base model (default: the one that the adapter names).")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the merged weights (default: as the base is stored).")] = None,
    into: Annotated[
        Into, typer.Option(help="After a 4-bit training: what the change is added to; auto takes what measures best.")
    ] = Into.auto,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Rows to measure on (default: four bundled prompts).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write it even if the update is lost, or the base is another one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Write base + adapter as one plain transformers model, read it back and measure it against base + adapter."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        from decal.errors import RunError

        raise RunError("the output folder is not empty", got=out, fix="Choose another --out.")
    with console.working("merging and measuring"):
        from decal.recipes import merge as recipe

        word = None if dtype is None else dtype.value
        try:
            merged = recipe.merge(adapter, out, base=base, dtype=word, into=into.value, data=data, force=force)
        except recipe.LostUpdate as lost:
            if as_json:
                console.dump({"candidates": [asdict(candidate) for candidate in lost.candidates]})
            else:
                console.show(proof(lost.candidates))
            raise
    if as_json:
        console.dump({**asdict(merged), "path": str(merged.path), "lossy": merged.lossy})
    else:
        show(merged)
    if not merged.proven:
        console.warn(
            "unproven: the adapter has no decal.json, so it was measured on the base as it is stored. If it was "
            "trained on a 4-bit base, that is another model."
        )
    if merged.lossy:
        console.warn(
            f"{1 - merged.rounding.survived:.0%} of the update was lost to rounding to {merged.dtype}: the merged "
            "model is not the one that you trained.\nServe the adapter beside its base, or merge with --dtype fp32."
        )


def proof(candidates: Sequence[Candidate], chosen: tuple[str, str] | None = None) -> Table:
    """Return the table of all ways that were measured."""
    columns = ("into", "written in", "KL to trained", "KL to base", "perplexity", "same top-1", "survived")
    table = console.plain_table(*columns, left=2)
    for c in candidates:
        numbers = (f"{c.kl:.3g}", f"{c.base_kl:.3g}", f"{c.perplexity:.4g}", f"{c.same_top1:.1%}")
        mark = " (chosen)" if (c.into, c.dtype) == chosen else ""
        table.add_row(f"{c.into}{mark}", c.dtype, *numbers, f"{c.rounding.survived:.1%}")
    return table


def show(merged: Merged) -> None:
    """Print where the model lies and how close it is."""
    from decal.cli.watch import megabytes

    rounding, agreement = merged.rounding, merged.agreement
    if len(merged.candidates) > 1:
        table = proof(merged.candidates, (merged.into, merged.dtype))
        table.add_row("trained stack", "", "0", "", f"{merged.perplexity:.4g}", "100.0%", "")
        console.show(table)
    lines = {
        "model": f"{merged.path} ({merged.dtype}, {megabytes(merged.bytes)})",
        "base": merged.base + (f", in training stored in {merged.trained_on}" if merged.trained_on else ""),
        "rounding": f"{rounding.survived:.2%} of the update survived; "
        f"{rounding.unchanged:.2%} of the weights it changes stayed the same number",
        "check": f"read back from disk and compared with base + adapter on {counted(agreement.tokens, 'token')}\n"
        f"largest logit difference {agreement.max_logit_difference:.3g}\n"
        f"mean KL {agreement.kl:.3g} nats (the adapter's own effect: {agreement.adapter_kl:.3g})\n"
        f"same most likely token at {agreement.same_top1:.1%} of positions",
        "next": f"decal chat --model {merged.path}",
    }
    console.out().print(console.facts(lines), soft_wrap=True)
