"""A run's own forecast, made before its weights are loaded, and the grade it gets when the run is over."""

from __future__ import annotations

import logging
import time as clock
from statistics import median
from typing import Any

import psutil
import torch

from decal.data.batches import Batches, InOrder
from decal.errors import DecalError
from decal.ops import nf4
from decal.ops.dropout import Drop
from decal.planning import cards, fit, memory, rss, time, wanted
from decal.planning.memory import Forecast
from decal.planning.sizes import told
from decal.planning.time import Pace
from decal.planning.wanted import Wanted
from decal.spec import RunConfig
from decal.training.precision import Precision

PROBE = 0.1  # seconds that measuring this machine's rates may take


class Grader:
    """Foresees a run, watches its peak and grades the forecast. Whatever fails here is a note and never stops a run.

    `notes` say what the forecast warns of.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._device = torch.device("cpu")
        self._forecast: Forecast | None = None
        self._pace: Pace | None = None
        self._before = 0
        self._resets = False
        self._took = 0.0

    def foresee(self, config: RunConfig, numbers: Precision, batches: Batches, held_out: InOrder | None) -> None:
        """Make the forecast. Nothing that decides a run's result is touched: no generator, no global setting."""
        began = clock.perf_counter()
        warm(config, numbers)
        self._device, self._before = numbers.device, rss.resident()
        try:
            # Within a budget of memory what layers keep is decided when training has begun: nothing to foresee.
            if config.train.memory is None or numbers.device.type != "cuda":
                self._foresee(wanted_of(config, numbers, batches, held_out))
        except DecalError:
            pass  # loading the weights meets it again, and says so
        except Exception as error:
            logging.getLogger("decal").debug("no forecast", exc_info=True)
            self.notes.append(f"no forecast of memory and time could be made ({type(error).__name__}: {error})")
        self._took = clock.perf_counter() - began

    def _foresee(self, asked: Wanted) -> None:
        self._forecast = memory.forecast(asked)
        dtype = torch.float32 if asked.device == "cpu" else torch.bfloat16
        card = cards.measured(self._device, dtype, PROBE)
        self._pace = time.pace(self._forecast.work, asked, card)
        room = device_memory(self._device)
        if self._forecast.needed > room:
            self.notes.append(too_large(self._forecast, room))

    def begin(self) -> None:
        """Count the peak from here on: the weights are there, and training begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._resets = rss.reset_peak()

    def grade(self, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return forecast, measured values and grade, as the manifest holds them. `steps` are the events of steps.

        Sizes in bytes, times in seconds; an error is forecast / measured - 1. None without a forecast or a step.
        """
        if self._forecast is None or self._pace is None or not steps:
            return None
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else rss.peak() - self._before
        seconds = [step["seconds"] for step in steps]
        per_token = median(step["seconds"] / step["tokens"] for step in steps[1:] or steps)
        total = time.foretold(seconds, [step["tokens"] for step in steps])
        largest = self._pace.tokens
        said = self._forecast.peak if cuda else self._forecast.resident
        return {
            "forecast": {
                "peak": said,
                "parts": self._forecast.phase("training").parts,
                "step_seconds": round(self._pace.step, 4),
                "step_tokens": largest,
                "seconds_by_one_step": round(total, 3),
                "made_in": round(self._took, 3),
            },
            "measured": {
                "peak": peak,
                "by": "torch.cuda.max_memory_allocated" if cuda else "resident memory above that before the forecast",
                "exact": cuda or self._resets,
                "step_seconds": round(per_token * largest, 4),
                "seconds": round(sum(seconds), 3),
            },
            "grade": {
                "peak_error": error(said, peak),
                "step_error": error(self._pace.step, per_token * largest),
                "seconds_error": error(total, sum(seconds)),
            },
        }


def wanted_of(config: RunConfig, numbers: Precision, batches: Batches, held_out: InOrder | None) -> Wanted:
    """Return what a run wants, with the largest micro-batch that its data hold."""
    device: Any = "cuda" if numbers.device.type == "cuda" else "cpu"
    largest = batches.largest()
    return wanted.of_run(
        config,
        device=device,
        numbers=numbers.name,
        batch=largest,
        eval_length=None if held_out is None else held_out.longest(),
        evaluates=held_out is not None,
    )


def warm(config: RunConfig, numbers: Precision) -> None:
    """Load the kernels of a quantised base and of dropout, whose compiler is no part of the run's tensors."""
    if numbers.device.type == "cpu" and config.train.method == "lora" and config.lora.lora_dropout > 0:
        Drop(0.5, 0)(torch.ones(1))
    formats = set() if config.quantize is None else {config.quantize.format, config.quantize.head}
    if formats & {"nf4", "fp4"} and numbers.device.type == "cpu":
        packed, absmax = nf4.quantize(torch.ones(64))
        nf4.dequantize(packed, absmax, shape=(64,))


def device_memory(device: torch.device) -> int:
    """Return the bytes that a card has in all, or that the computer has free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().available)


def too_large(forecast: Forecast, room: int) -> str:
    """Return the note on a run that will hardly fit."""
    there = "the card has" if forecast.wanted.device == "cuda" else "free are"
    text = f"this run needs about {told(forecast.needed)}, and {there} {told(room)}"
    offer = fit.offer(forecast, room, count=1)
    if not offer.fittings:
        return f"{text}: take a smaller model or a larger machine"
    (way,) = offer.fittings
    return f"{text}. It would fit ({told(way.forecast.needed)}) with {way.settings}; for other ways see decal plan"


def error(said: float, seen: float) -> float | None:
    """Return forecast / measured - 1; None where nothing was measured."""
    return round(said / seen - 1, 4) if seen > 0 else None
