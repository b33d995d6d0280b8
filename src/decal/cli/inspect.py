"""`decal inspect`: what an adapter is, and anything odd about it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decal.cli import console
from decal.errors import AdapterError

if TYPE_CHECKING:
    from decal.cli.adapter_facts import Delta, Facts
    from decal.files.sealed import Seal

EXAMPLES = "Examples:\n\ndecal inspect runs/first/adapter\n\ndecal inspect runs/first --layers --json"


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter or run folder, or hub id.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="A line for each layer, not for each kind of layer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show an adapter's rank, scale, targets, base and size, how large its changes are, and anything odd about it."""
    with console.working("reading the adapter"):
        from decal import locate
        from decal.cli import adapter_facts
        from decal.model import saved

        found = adapter_facts.read(locate.folder(adapter_of(adapter), kind="adapter", patterns=saved.patterns(None)))
    if as_json:
        console.dump(plain(found))
        return
    console.out().print(console.facts(summary(found)), soft_wrap=True)
    if found.deltas:
        console.say("")
        table = console.plain_table(
            "layer" if layers else "module", "layers", "rank", "scale", "norm of s·B·A", "largest"
        )
        for name, group in groups(found.deltas, each=layers).items():
            norms = [delta.norm for delta in group if delta.misfit is None] or [math.nan]
            ranks, scales = ({getattr(d, field) for d in group} for field in ("rank", "scale"))
            table.add_row(
                name,
                f"{len(group)}",
                ", ".join(f"{rank}" for rank in sorted(ranks)),
                ", ".join(f"{scale:g}" for scale in sorted(scales)),
                f"{sum(norms) / len(norms):.4g}",
                f"{max(norms):.4g}",
            )
        console.show(table)
        console.say("norms are Frobenius norms; the mean over the layers of a kind, and the largest", "dim")
    console.say("")
    if found.odd:
        console.say("look at", "bold yellow")
        for line in found.odd:
            console.say(f"  {line}")
    else:
        console.say("nothing odd", "green")


def adapter_of(name: str) -> str:
    """A run folder stands for the adapter in it."""
    from pathlib import Path

    from decal import rundir

    inside = Path(name) / rundir.ADAPTER
    return str(inside) if (Path(name) / rundir.RUN).is_file() and inside.is_dir() else name


def summary(found: Facts) -> dict[str, str]:
    """Return the lines above the table."""
    from decal.cli.watch import megabytes
    from decal.files import sealed

    settings = found.settings
    lines = {"adapter": str(found.path), "base": str(settings.get("base_model_name_or_path") or "not named")}
    try:
        seal = sealed.read(found.path)
        lines["seal"] = sealed_parts(seal)
    except AdapterError as error:  # damage is told, and stops nothing
        seal, lines["seal"] = sealed.UNSEALED, error.what
    if seal.base_fingerprint is not None:
        stored = "as it is stored" if seal.quantize is None else f"in {seal.quantize.told}"
        lines["trained on"] = f"its base {stored}, weights {seal.base_fingerprint[:12]}"
    if found.config is not None:
        config = found.config
        kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        lines["kind"] = f"{kind}, rank {config.r}, alpha {config.lora_alpha:g}, scale {scale:g}"
        targets = config.target_modules
        lines["targets"] = (
            targets if isinstance(targets, str) else ", ".join(targets or ["PEFT's default for the model"])
        )
    lines["size"] = (
        f"{found.parameters:,} parameters, {megabytes(found.bytes)}, {', '.join(found.dtypes) or 'no tensors'}"
    )
    if found.others:
        more = f" and {len(found.others) - 3} more" if len(found.others) > 3 else ""
        lines["also"] = ", ".join(found.others[:3]) + more
    return lines


def sealed_parts(seal: Seal) -> str:
    """Return what `decal verify` can compare."""
    parts = {
        "base": seal.base_fingerprint,
        "scale": seal.scale,
        "tensors": seal.tensors,
        "tokenizer and template": seal.tokens,
        "data": seal.data,
        "answers to 8 prompts": seal.reference,
    }
    there = [name for name, part in parts.items() if part is not None]
    return ", ".join(there) or "none (no decal.json): nothing of it can be verified"


def groups(deltas: tuple[Delta, ...], *, each: bool) -> dict[str, list[Delta]]:
    """Return the changes by kind of layer, or each alone."""
    found: dict[str, list[Delta]] = {}
    for delta in deltas:
        found.setdefault(delta.layer if each else delta.layer.rpartition(".")[2], []).append(delta)
    return found


def plain(found: Facts) -> dict[str, Any]:
    """Return everything as plain values for JSON."""
    from dataclasses import asdict

    return {
        "path": str(found.path),
        "config": found.settings,
        "applicable": found.config is not None,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "dtypes": list(found.dtypes),
        "deltas": [asdict(delta) for delta in found.deltas],
        "other_tensors": list(found.others),
        "odd": list(found.odd),
    }
