"""What a run does when a card's memory runs out in spite of the forecast: smaller micro-batches from that step on.

A step's gradient is that of the mean over all its loss tokens (training/step.py), so that smaller micro-batches give
the same one, summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from decal.data.batch import Batch
from decal.errors import RunError
from decal.training.budget import NoRoom
from decal.training.losses import Loss
from decal.training.precision import Precision
from decal.training.state import Progress
from decal.training.step import Backward


def guarded(
    run: Backward, progress: Progress, *, say: Callable[[str], object], forget: Callable[[], object]
) -> Backward:
    """Return `run`, which goes over halves of its micro-batches where memory runs out, then and from then on.

    `progress.cut` says into how many parts each micro-batch is cut. `forget` gives up what depends on their size.
    Raises RunError, or what `run` says of a budget, where a single row is too much. No weight has moved then.
    """

    def backward(
        model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler, *, precision: Precision
    ) -> Tensor:
        while True:
            smaller = [part for batch in batches for part in batch.parts(progress.cut)]
            refused: NoRoom | None = None
            try:
                return run(model, smaller, loss, scaler, precision=precision)
            except torch.OutOfMemoryError:
                pass
            except NoRoom as error:
                refused = error.with_traceback(None)
            # Only here, past the handlers, are the tensors free that the failed pass held.
            model.zero_grad(set_to_none=True)
            forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rows = max(len(batch.input_ids) for batch in smaller)
            if rows == 1:
                raise refused or _too_long(smaller)
            progress.cut *= 2
            say(
                f"memory ran out with {rows} rows in a micro-batch: from here on half as many, in twice as many "
                "micro-batches, which gives the same gradient in more time"
            )

    return backward


def _too_long(batches: Sequence[Batch]) -> RunError:
    return RunError(
        "the card's memory ran out with a single row in a micro-batch",
        got=f"{max(batch.input_ids.shape[1] for batch in batches):,} tokens in the row",
        fix="Set train.gradient_checkpointing=true, shorten data.max_length, or use quantize=nf4 or "
        "train.optimizer=adamw8bit: decal plan says what fits.",
    )
