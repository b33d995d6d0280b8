"""How a plan is told: tables of memory by part, what fits, what would make it fit, and time."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from decal.cli import console
from decal.planning import classic, sizes

if TYPE_CHECKING:
    from decal.planning.answer import Plan, Way
    from decal.planning.cards import Card
    from decal.planning.fit import Fitting, Offer

WIDTH = 90  # columns of a line of advice


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


def show(plan: Plan, card: Card | None, *, no_epoch: str | None) -> None:
    """Print a plan. `no_epoch`: why the time of an epoch is not known."""
    first = plan.way.forecast
    wanted = first.wanted
    share = 100 * first.trainable / first.parameters
    trained = "all weights" if wanted.full else f"LoRA r={wanted.lora.r}"
    stored = "" if wanted.quantize is None else f" on {wanted.quantize.told}"
    facts = {
        "model": wanted.model,
        "train": f"{trained}{stored}: {first.trainable:,} of {first.parameters:,} parameters ({share:.2f}%), "
        f"{wanted.train.optimizer}",
        "step": f"{wanted.train.accumulate} x {wanted.train.micro_batch} rows of {wanted.length:,} tokens, "
        f"{wanted.numbers} on {wanted.device}",
    }
    console.say(str(console.facts(facts)) + "\n")
    _show_memory(plan)
    _show_time(plan, card, no_epoch)
    _show_fit(plan)
    for caution in plan.cautions:
        console.warn(textwrap.fill(caution, WIDTH, subsequent_indent="  "))


def _show_memory(plan: Plan) -> None:
    """Print every phase by part, in one unit; a run's evaluation only where it has one."""
    ways = [(f"training, {way.name}", way.forecast.phase("training")) for way in plan.ways]
    wanted = plan.way.forecast.wanted
    names = ["evaluation"] * wanted.evaluates + ["saving"] + ["merging"] * (not wanted.full)
    columns = ways + [(name, plan.way.forecast.phase(name)) for name in names]
    unit = sizes.unit(max(phase.peak for _, phase in columns))
    table = console.plain_table(unit, *(name for name, _ in columns))
    for part in columns[0][1].parts:
        if any(1000 * phase.parts[part] > phase.peak for _, phase in columns):
            table.add_row(part, *_cells([phase.parts[part] for _, phase in columns], unit))
    table.add_row("peak", *_cells([phase.peak for _, phase in columns], unit), style="bold")
    if any(phase.host for _, phase in columns):
        table.add_row("host memory beside it", *_cells([phase.host for _, phase in columns], unit))
    console.show(table)


def _cells(found: list[int], unit: str) -> list[str]:
    return [sizes.number(size, unit) if size else "" for size in found]


def _show_time(plan: Plan, card: Card | None, no_epoch: str | None) -> None:
    if card is None:
        console.say("\ntime: not known here; give --card or --tflops")
        return
    lines = []
    for way in plan.ways:
        pace = way.pace
        assert pace is not None, "a card gives a pace"
        line = f"{way.name}: {pace.step:,.3g} s a step, {pace.tokens_per_second:,.0f} tokens/s"
        if pace.epoch is not None:
            line += f"; an epoch: {pace.steps:,} steps in {clock(pace.epoch)}"
        lines.append(line)
    lines += [] if no_epoch is None else [f"an epoch: not known ({no_epoch}); give --rows or --tokens"]
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
    if plan.way.forecast.wanted.device == "cuda":
        lines.append("(what it needs includes the allocator's holes and CUDA's context)")
    console.say("\n" + "\n".join(lines))
    if plan.offer is not None:
        _show_offer(plan.offer)


def _show_offer(offer: Offer) -> None:
    if offer.fittings:
        console.say("\nwhat would make it fit, the cheapest first:")
        for number, fitting in enumerate(offer.fittings, start=1):
            console.say(f"  {number}. needs {sizes.told(fitting.forecast.needed)}")
            _show_changes(fitting)
        if offer.fewer:
            console.say("  no other way was found")
        return
    console.say("\nnothing makes it fit: take a smaller model or a larger card")
    if offer.least is not None:
        console.say(f"  the least that it needs is {sizes.told(offer.least.forecast.needed)}, with")
        _show_changes(offer.least)


def _show_changes(fitting: Fitting) -> None:
    for one in fitting.changes:
        console.say(f"     {one}")
        console.say(f"         {one.price}", style="dim")


def _verdict(way: Way, room: int) -> str:
    word = "fits" if way.fits else "does not fit"
    return f"{way.name}: {word} in {sizes.told(room)}: it needs {sizes.told(way.forecast.needed)}"
