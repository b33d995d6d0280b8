"""The rows of a step whose loss or gradient was NaN or infinite, written for a person to look at.

`not-finite/step-N.jsonl` in the run folder has a line for each row: `micro_batch` and `row` (from 0), `loss` (its mean
over `loss_tokens`, with the weights from before the step and dropout off; a text where it is not finite, null where the
row has no loss), `text`, `input_ids` and `labels`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from decal import rundir
from decal.data.batch import Batch
from decal.model.evaluating import evaluating
from decal.rundir import RunDir
from decal.training.losses import Loss
from decal.training.precision import Precision

FOLDER = "not-finite"
Decode = Callable[[Sequence[int]], str]


def write(
    run: RunDir,
    step: int,
    batches: Sequence[Batch],
    *,
    model: nn.Module,
    loss: Loss,
    precision: Precision,
    decode: Decode | None,
) -> str:
    """Write the rows of `step`; return where they are and which of them have no finite loss by themselves."""
    lines: list[dict[str, Any]] = []
    with evaluating(model):
        for number, batch in enumerate(batches):
            for row, one in enumerate(batch.parts(len(batch.input_ids))):
                ids: list[int] = one.input_ids[0].tolist()
                line = {
                    "micro_batch": number,
                    "row": row,
                    "loss": _loss(model, one, loss, precision),
                    "loss_tokens": one.loss_tokens,
                    "text": None if decode is None else decode(ids),
                    "input_ids": ids,
                    "labels": one.labels[0].tolist(),
                }
                lines.append(line)
    file = run.path / FOLDER / f"step-{step}.jsonl"
    try:
        rundir.write_bytes(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    except rundir.NotWritten as error:
        return f"The step's rows could not be written ({error.reason})"
    bad = [line for line in lines if isinstance(line["loss"], str)]
    alone = f"{len(bad)} of {len(lines)} with no finite loss alone" if bad else "each with a finite loss alone"
    return f"The step's rows are in {file.relative_to(run.path)}, {alone}"


def _loss(model: nn.Module, row: Batch, loss: Loss, precision: Precision) -> float | str | None:
    if loss.count(row) == 0:
        return None
    with precision.autocast():
        total, count = loss(model, row)
    value = float(total) / count
    return value if math.isfinite(value) else str(value)
