"""Whether a run that was killed goes on as if nothing had been: two runs' last checkpoints, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from decal.checks.result import Check, failed, passed
from decal.data import prepare as data_door
from decal.data.samples import Samples
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import state

NAME = "resume"
SHORT = 16  # rows that are short enough to stay: the length of the 16th shortest is the longest
LIMIT = 64  # rows of the data that are read
# On a card sums are made in an order that no one fixes: of the largest value in each tensor.
CUDA_TOLERANCE = 1e-3
FILES = {state.TRAINABLE: "weight", state.OPTIMIZER: "optimizer state", state.RNG: "random generator"}


def shortened(config: RunConfig, folder: Path, *, steps: int, tokenizer: Any) -> RunConfig:
    """Return the run of `config` in few steps on its shortest rows, in `folder`, with a save and an evaluation amid."""
    limit = min(config.data.limit or LIMIT, LIMIT)
    data = config.data.model_copy(
        update={"limit": limit, "eval_rows": 0, "eval_path": None, "eval_split": None, "streaming": False}
    )
    prepared = data_door.prepare(data, tokenizer, seed=config.train.seed)
    train = prepared.train
    assert isinstance(train, Samples)
    lengths = sorted(train.length(index) for index in range(len(train)))
    longest = lengths[:SHORT][-1]
    data = data.model_copy(
        update={
            "max_length": max(8, longest),
            "too_long": "drop" if longest < config.data.max_length else config.data.too_long,
            "eval_rows": prepared.ledger.rows // 2,  # long rows are dropped from both halves: few are left
        }
    )
    half = max(1, steps // 2)
    changes: dict[str, Any] = {
        "steps": steps,
        "micro_batch": min(config.train.micro_batch, 2),
        "accumulate": min(config.train.accumulate, 2),
        "warmup": min(config.train.warmup, 1.0 if config.train.warmup >= 1 else 0.5),
        "save_every": half,
        "eval_every": half if data.eval_rows else None,
        "early_stopping": None,
        "log_to": [],
        "keep": 2,
        "check": False,
    }
    return config.model_copy(
        update={"output": str(folder), "data": data, "train": config.train.model_copy(update=changes)}
    )


def compare(resumed: RunDir, whole: RunDir, *, device: str) -> Check:
    """Compare the last checkpoints: equal bits on a CPU, CUDA_TOLERANCE on a card."""
    mine, expected = resumed.checkpoints()[-1], whole.checkpoints()[-1]
    if mine.name != expected.name:
        return failed(NAME, f"it ended at {mine.name}, the whole run at {expected.name}", fix=_fix("the position"))
    tolerance = CUDA_TOLERANCE if device == "cuda" else 0.0
    worst, count = 0.0, 0
    for file, what in FILES.items():
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
    for part, before in _rest(expected).items():
        if _rest(mine)[part] != before:
            return failed(NAME, f"the {part} of the two runs differ", fix=_fix(part))
    how = "equal bits" if worst == 0 else f"within {worst:.1e} of the largest (allowed on a card: {tolerance:g})"
    return passed(NAME, f"killed, resumed, compared after {mine.name.replace('-', ' ')}: {count} tensors, {how}")


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value; infinite where shapes differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def _rest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors: progress, data position, loss scale, generators; without times."""
    held = json.loads((checkpoint / state.STATE).read_text(encoding="utf-8"))
    held["progress"] = {name: value for name, value in held["progress"].items() if name != "seconds"}
    return dict(held)


def _fix(what: str) -> str:
    return f"Do not rely on --resume for these settings, and report it: the {what} is not restored."
