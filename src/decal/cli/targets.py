"""`decal targets`: which layers an adapter would change."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from decal.cli import console
from decal.words import counted

EXAMPLES = (
    "Examples:\n\ndecal targets Qwen/Qwen3-0.6B\n\ndecal targets Qwen/Qwen3-0.6B --targets q_proj,v_proj --rank 8"
)


def targets(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id; only its config is read.")],
    names: Annotated[
        str, typer.Option("--targets", help="all-linear, attention, names (q_proj,v_proj) or a regex.")
    ] = "all-linear",
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show which layers of a model the targets match, which they do not, and what each kind would train."""
    from decal.cli.overrides import target_names

    with console.working("reading the model's configuration"):
        rows = table(model, target_names(names), rank)
    if as_json:
        console.dump({"model": model, "targets": names, "rank": rank, "modules": rows})
        return
    shown = console.plain_table("module", "shape", "layers", "adapted", "trainable", left=2)
    for row in rows:
        style = "" if row["adapted"] else "dim"
        parts = (row["module"], row["shape"], f"{row['layers']:,}", f"{row['adapted']:,}", f"{row['trainable']:,}")
        shown.add_row(*parts, style=style)
    console.show(shown)
    total = sum(row["trainable"] for row in rows)
    adapted = sum(row["adapted"] for row in rows)
    console.say(f"\n{names} at rank {rank}: {counted(adapted, 'layer')}, {counted(total, 'trainable parameter')}")


def table(model: str, names: str | list[str] | None, rank: int) -> list[dict[str, Any]]:
    """Return a row for each kind of layer that can be adapted, in the model's order."""
    from decal.layers.catalog import base_of
    from decal.model import count, load, targets
    from decal.spec import LoraConfig, TaskType

    meta = load.meta_model(model)
    config = LoraConfig(r=rank, target_modules=names, task_type=TaskType.CAUSAL_LM)
    layers = {name: module for name, module in targets.modules(meta) if targets.adaptable(module)}
    chosen = {target.name for target in targets.resolve(meta, config).targets}
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, module in layers.items():
        weight: Any = module.weight
        base = base_of(module)
        size = tuple(weight.shape) if base is None else (base.out_features, base.in_features)
        kinds.setdefault((name.rpartition(".")[2], f"{size[0]} x {size[1]}"), []).append(name)
    trainable = count.per_module(meta, config)
    rows = []
    for (end, shape), full in kinds.items():
        adapted = sum(name in chosen for name in full)
        of_this_name, parameters = trainable.get(end, (0, 0))
        share = parameters * adapted // of_this_name if of_this_name else 0
        rows.append({"module": end, "shape": shape, "layers": len(full), "adapted": adapted, "trainable": share})
    return rows
