"""The whole plan of a run: phases, ways of recomputing, what fits, what would make it fit, how long it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from decal.planning import fit, memory, time
from decal.planning.cards import Card
from decal.planning.fit import Fitting, Offer
from decal.planning.memory import Forecast, Known
from decal.planning.sizes import told
from decal.planning.time import Epoch, Pace
from decal.planning.wanted import Wanted

# Ways of keeping less for backward, with the settings that choose them; the first keeps all.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "keep all": {"gradient_checkpointing": False},
    "checkpointing": {"gradient_checkpointing": True},
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A run under one way of recomputing."""

    name: str
    forecast: Forecast
    pace: Pace | None
    fits: bool | None  # None: nobody said in how much


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`ways` hold every way of recomputing, `chosen` is the name of the one that the settings ask for.

    `room` is what the device has, in bytes. `offer` is there where the chosen way does not fit.
    """

    ways: tuple[Way, ...]
    chosen: str
    room: int | None
    offer: Offer | None
    cautions: tuple[str, ...]

    @property
    def way(self) -> Way:
        return next(way for way in self.ways if way.name == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON takes it; all sizes in bytes, times in seconds."""
        wanted = self.way.forecast.wanted
        return {
            "model": wanted.model,
            "device": wanted.device,
            "numbers": wanted.numbers,
            "length": wanted.length,
            "micro_batch": wanted.train.micro_batch,
            "evaluates": wanted.evaluates,
            "room": self.room,
            "chosen": self.chosen,
            "trainable": self.way.forecast.trainable,
            "parameters": self.way.forecast.parameters,
            "ways": {
                way.name: {
                    "phases": {phase.name: phase.to_dict() for phase in way.forecast.phases},
                    "needed": way.forecast.needed,
                    "fits": way.fits,
                    "flops": way.forecast.work.flops,
                    "seconds_per_step": None if way.pace is None else way.pace.step,
                    "steps_per_epoch": None if way.pace is None else way.pace.steps,
                    "seconds_per_epoch": None if way.pace is None else way.pace.epoch,
                    "tokens_per_second": None if way.pace is None else way.pace.tokens_per_second,
                }
                for way in self.ways
            },
            "fit_with": [_fitting(f) for f in self.offer.fittings] if self.offer else [],
            "no_other_way": self.offer is not None and self.offer.fewer,
            "least": _fitting(self.offer.least) if self.offer and self.offer.least else None,
            "cautions": list(self.cautions),
        }


def _fitting(found: Fitting) -> dict[str, Any]:
    return {
        "settings": found.settings,
        "changes": [{"settings": str(change), "price": change.price} for change in found.changes],
        "peak": found.forecast.peak,
        "needed": found.forecast.needed,
    }


def plan(wanted: Wanted, *, room: int | None = None, card: Card | None = None, epoch: Epoch | None = None) -> Plan:
    """Return the plan of a run on a device with `room` bytes, at `card`'s rates, with the time of an epoch if given."""
    ways, known = [], Known()
    for name, settings in RECOMPUTE.items():
        forecast = memory.forecast(replace(wanted, train=wanted.train.model_copy(update=settings)), known)
        pace = None if card is None else time.pace(forecast.work, wanted, card, epoch=epoch)
        fits = None if room is None else forecast.needed <= room
        ways.append(Way(name=name, forecast=forecast, pace=pace, fits=fits))
    chosen = next(n for n, s in RECOMPUTE.items() if all(getattr(wanted.train, k) == v for k, v in s.items()))
    way = next(way for way in ways if way.name == chosen)
    offer = fit.offer(way.forecast, room, known=known) if room is not None and way.fits is False else None
    return Plan(ways=tuple(ways), chosen=chosen, room=room, offer=offer, cautions=tuple(cautions(way, room)))


def cautions(way: Way, room: int | None) -> list[str]:
    """Return what a person should know before starting this."""
    forecast, notes = way.forecast, []
    longest = forecast.positions
    if longest is not None and forecast.wanted.length > longest:
        notes.append(
            f"rows of {forecast.wanted.length:,} tokens are longer than the {longest:,} positions of the model, "
            "which never learnt what lies beyond"
        )
    if forecast.dtype_assumed:
        notes.append("the model's configuration does not say how its weights are stored: fp32 is assumed")
    still = sum(memory.still(forecast.phase("training")).values())
    if room is not None and still > room:
        notes.append(f"the weights and the optimizer alone take {told(still)}, whatever the length")
    return notes
