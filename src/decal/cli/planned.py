"""How a plan is told: tables of memory by part, what fits, what would make it fit, and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decal.cli import console
from decal.planning import classic
from decal.planning.sizes import gib

if TYPE_CHECKING:
    from decal.planning.answer import Plan, Way
    from decal.planning.cards import Card


def show_classic(*, as_json: bool) -> None:
    """Print the table of 7B, 13B and 70B."""
    lines = classic.lines()
    if as_json:
        console.dump([{"model": x.model, "method": x.method, "gb": x.gb, "arithmetic": x.arithmetic} for x in lines])
        return
    table = console.plain_table("model", "method", "GB", left=2)
    table.add_column("how", overflow="fold")
    for line in lines:
        table.add_row(line.model, line.method, f"{line.gb:,.1f}", line.arithmetic)
    console.show(table)
    console.say(
        "\nLlama 2's shapes; weights, gradients and optimizer alone, before activations. GB is 10^9 bytes.\n"
        f"LoRA and QLoRA: r={classic.RANK} on all linear layers; all of the adapter in fp32.\n"
        "decal plan MODEL counts all the rest, in GiB (2^30 bytes)."
    )


def show(plan: Plan, card: Card | None) -> None:
    """Print a plan."""
    first = plan.way.forecast
    wanted = first.wanted
    share = 100 * first.trainable / first.parameters
    trained = "all weights" if wanted.full else f"LoRA r={wanted.lora.r}"
    stored = "" if wanted.quantize is None else f" on {wanted.quantize.format}"
    facts = {
        "model": wanted.model,
        "train": f"{trained}{stored}: {first.trainable:,} of {first.parameters:,} parameters ({share:.2f}%), "
        f"{wanted.train.optimizer}",
        "step": f"{wanted.train.accumulate} x {wanted.train.micro_batch} rows of {wanted.length:,} tokens, "
        f"{wanted.numbers} on {wanted.device}",
    }
    console.say(str(console.facts(facts)) + "\n")
    _show_memory(plan)
    _show_time(plan, card)
    _show_fit(plan)
    for caution in plan.cautions:
        console.warn(caution)


def _show_memory(plan: Plan) -> None:
    ways = [*plan.ways]
    phases = plan.way.forecast.phases
    table = console.plain_table(
        "GiB", *(f"training, {way.name}" for way in ways), *(phase.name for phase in phases[1:3])
    )
    columns = [way.forecast.phase("training").parts for way in ways] + [phase.parts for phase in phases[1:3]]
    for part in columns[0]:
        sizes = [parts[part] for parts in columns]
        if any(1000 * size >= sum(parts.values()) for size, parts in zip(sizes, columns, strict=True)):
            table.add_row(part, *(gib(size) if size else "" for size in sizes))
    table.add_row("peak", *(gib(sum(parts.values())) for parts in columns), style="bold")
    console.show(table)
    saving, merging = phases[2], phases[3]
    lines = []
    if saving.host:
        lines.append(f"saving takes {gib(saving.host)} GiB of the computer's memory")
    if merging.host:
        lines.append(f"decal merge takes {gib(merging.host)} GiB of the computer's memory, and no card")
    console.say("".join(f"{line}\n" for line in ["", *lines]).rstrip("\n"))


def _show_time(plan: Plan, card: Card | None) -> None:
    if card is None:
        console.say("\ntime: not known here; give --card or --tflops")
        return
    lines = []
    for way in plan.ways:
        pace = way.pace
        assert pace is not None, "a card gives a pace"
        line = f"{way.name}: {pace.step:,.2f} s a step, {pace.tokens_per_second:,.0f} tokens/s"
        if pace.epoch is not None:
            line += f", {pace.steps:,} steps in {clock(pace.epoch)}"
        lines.append(line)
    where = f"{card.name}: {card.tflops:,.3g} TFLOP/s ({card.source})"
    console.say("\n" + str(console.facts({"time": "\n".join([*lines, f"on {where}"])})))


def clock(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _show_fit(plan: Plan) -> None:
    if plan.room is None:
        console.say("\nfits: give --gpu 24GiB (or --card) to know")
        return
    lines = [_verdict(way, plan.room) for way in plan.ways]
    console.say("\n" + "\n".join(lines))
    if plan.way.fits:
        return
    if not plan.fittings:
        console.say("\nnothing that was tried makes it fit: take a smaller model or a larger card")
        return
    console.say("\nwhat would make it fit, the cheapest first:")
    for number, fitting in enumerate(plan.fittings, start=1):
        console.say(f"  {number}. {fitting.settings}")
        console.say(f"     needs {gib(fitting.forecast.needed)} GiB; {fitting.price}")


def _verdict(way: Way, room: int) -> str:
    forecast = way.forecast
    word = "fits" if way.fits else "does not fit"
    extra = ", the allocator's holes and CUDA's context included" if forecast.wanted.device == "cuda" else ""
    return f"{way.name}: {word} in {gib(room)} GiB: it needs {gib(forecast.needed)} GiB{extra}"
