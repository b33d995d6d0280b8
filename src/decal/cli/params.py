"""`decal params`: what an adapter of each rank costs."""

from __future__ import annotations

from typing import Annotated

import typer

from decal.cli import console
from decal.errors import ConfigError

EXAMPLES = (
    "Examples:\n\n"
    "decal params Qwen/Qwen3-0.6B --rank 8,16,64\n\n"
    "decal params Qwen/Qwen3-0.6B --targets attention --json"
)


def params(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id; only its config is read.")],
    rank: Annotated[str, typer.Option(help="Ranks, with commas between them.")] = "4,8,16,32,64",
    targets: Annotated[
        str, typer.Option(help="all-linear, attention, names (q_proj,v_proj) or a regex.")
    ] = "all-linear",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show how many parameters an adapter of each rank trains, their true share, and the adapter's size."""
    from decal.cli.overrides import target_names

    ranks = read_ranks(rank)
    with console.working("reading the model's configuration"):
        from decal.model import count, load
        from decal.spec import LoraConfig, TaskType

        config = LoraConfig(target_modules=target_names(targets), task_type=TaskType.CAUSAL_LM)
        lines = count.count(load.meta_model(model), config, ranks)
    if as_json:
        rows = [
            {
                "rank": c.rank,
                "trainable": c.trainable,
                "total": c.total,
                "percent": c.percent,
                "adapter_mb": c.adapter_mb,
            }
            for c in lines
        ]
        console.dump({"model": model, "targets": targets, "ranks": rows})
        return
    table = console.plain_table("rank", "trainable", "of all", "share", "adapter (fp32)", left=0)
    for c in lines:
        table.add_row(f"{c.rank}", f"{c.trainable:,}", f"{c.total:,}", f"{c.percent:.2f}%", f"{c.adapter_mb:,.1f} MB")
    console.show(table)


def read_ranks(text: str) -> list[int]:
    """Read `4,8,16`."""
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise ConfigError("--rank needs positive whole numbers", got=text, fix="Write them as 4,8,16.")
    return ranks
