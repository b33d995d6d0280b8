"""Whether a run that was killed goes on as if nothing had been: two runs' last checkpoints, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from decal import rundir
from decal.checks.result import Check, failed, passed
from decal.reading import read_json
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import state
from decal.training.job import Job
from decal.training.plan import warmup_steps
from decal.words import counted

NAME = "resume"
ROWS = 64  # at least so many rows are read, however few the steps need
HELD_OUT = 16  # rows: the short form is evaluated three times
# On a card sums are made in an order that no one fixes: of the largest value in each tensor.
CUDA_TOLERANCE = 1e-3
SAVED = f"{rundir.ADAPTER}/adapter_model.safetensors"
FILES = {
    state.TRAINABLE: "weight",
    state.OPTIMIZER: "optimizer state",
    state.RNG: "random generator",
    SAVED: "saved tensor",
}
# What a value of state.json is, by how its name begins: the first that fits. A schedule has no state of its own.
PARTS = {
    "progress.step": "step, which sets the rate",
    "progress.best": "best evaluation",
    "progress.evaluated": "best evaluation",
    "progress.worse": "best evaluation",
    "progress.watch": "memory of the watch",
    "progress.": "progress",
    "data.": "position in the data",
    "scaler.": "loss scale",
    "random.": "random generator",
}
TIMES = "progress.seconds"  # how long a run took is no part of its result


@dataclass(frozen=True, kw_only=True)
class Short:
    """The short form of a run, and what of its settings was changed: (settings, why) each."""

    config: RunConfig
    changed: tuple[tuple[str, str], ...]

    def says(self) -> str:
        """Return in a line what was changed and why."""
        return "; ".join(f"{settings} ({why})" for settings, why in self.changed)


def shortened(job: Job, folder: Path, *, steps: int) -> Short:
    """Return the run of `job` in few steps, in `folder`; every setting that does not make it long stays."""
    config, half = job.config, max(1, steps // 2)
    train: dict[str, Any] = {"steps": steps, "save_every": half}
    if job.held_out is not None:
        train["eval_every"] = half
    if warmup_steps(config.train.warmup, steps) >= steps:
        train["warmup"] = half
    # Trackers and the forecast see no end of a run that is killed; auto_stop could end one before there is a proof.
    aside = {"log_to": [], "check": False, "auto_stop": False}
    rows = fewer_rows(job, steps)
    groups = [
        ("train", train, "few steps, a checkpoint in the middle"),
        ("data", rows, "the rows that they need"),
        ("train", aside, "nothing but training"),
    ]
    changed = tuple((told, why) for section, values, why in groups if (told := differing(config, section, values)))
    data = config.data.model_copy(update=rows)
    short = config.train.model_copy(update={**train, **aside})
    return Short(
        config=config.model_copy(update={"output": str(folder), "data": data, "train": short}), changed=changed
    )


def fewer_rows(job: Job, steps: int) -> dict[str, Any]:
    """Return settings under which no more rows are read than `steps` steps take; of a stream none is read in vain."""
    data, epoch = job.config.data, job.batches.steps_per_epoch
    rows: dict[str, Any] = {"eval_rows": min(data.eval_rows, HELD_OUT)}
    if epoch is not None:
        read = job.data.ledger.rows
        needed = max(ROWS, math.ceil(read * steps / epoch))
        if needed < read:
            rows["limit"] = needed + rows["eval_rows"]
    return rows


def differing(config: RunConfig, section: str, values: dict[str, Any]) -> str:
    """Return the values that the run itself has not, as one writes them."""
    before = getattr(config, section)
    return ", ".join(
        f"{section}.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values.items()
        if getattr(before, name) != value
    )


def compare(resumed: RunDir, whole: RunDir, *, device: str) -> Check:
    """Compare all that the last checkpoints hold but times: equal bits on a CPU, CUDA_TOLERANCE on a card."""
    mine, expected = resumed.checkpoints()[-1], whole.checkpoints()[-1]
    if mine.name != expected.name:
        return failed(NAME, f"it ended at {mine.name}, the whole run at {expected.name}", fix=_fix("position"))
    tolerance = CUDA_TOLERANCE if device == "cuda" else 0.0
    worst, count = 0.0, 0
    for file, what in FILES.items():
        if not (expected / file).exists():  # full fine-tuning saves no adapter
            continue
        ours, theirs = load_file(mine / file), load_file(expected / file)
        if ours.keys() != theirs.keys():
            return failed(NAME, f"{what}s differ in number: {len(ours)} and {len(theirs)}", fix=_fix(what))
        apart = {name: difference(ours[name], theirs[name]) for name in theirs}
        exact = file == state.RNG
        odd = [name for name, far in apart.items() if far > (0.0 if exact else tolerance)]
        if odd:
            far = max(apart[name] for name in odd)
            measure = f"{len(odd)} of {len(apart)} {what}s differ, such as {odd[0]}, by up to {far:.1e} of the largest"
            return failed(NAME, measure, fix=_fix(what))
        worst, count = max(worst, *apart.values()), count + len(apart)
    here, there = values_of(mine), values_of(expected)
    for name in sorted(here.keys() | there.keys()):
        # What is measured on a card is as inexact as the tensors; positions, scales and generators are not.
        near = tolerance if name.startswith("progress.") else 0.0
        if not same(here.get(name), there.get(name), near):
            part = next((said for start, said in PARTS.items() if name.startswith(start)), name)
            measure = f"the {part} differs: {name} is {shown(here, name)}, in the whole run {shown(there, name)}"
            return failed(NAME, measure, fix=_fix(part))
    how = "equal bits" if worst == 0 else f"within {worst:.1e} of the largest (allowed on a card: {tolerance:g})"
    return passed(
        NAME, f"killed, resumed, compared after {mine.name.replace('-', ' ')}: {counted(count, 'tensor')}, {how}"
    )


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value; infinite where shapes differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def values_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors by dotted names; without times."""
    values = dict(_flat(read_json(checkpoint / state.STATE)))
    values.pop(TIMES, None)
    return values


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether two values are equal; fractions, also those in lists, to within a share of the larger."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b))
    return bool(a == b)


def shown(values: dict[str, Any], name: str) -> str:
    """Return a value in a few letters."""
    text = repr(values[name]) if name in values else "not there"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _fix(what: str) -> str:
    return f"Do not rely on --resume for these settings, and report it: the {what} is not restored."
