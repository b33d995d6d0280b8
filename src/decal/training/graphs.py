"""Forward and backward of a micro-batch as one CUDA graph, for shapes of batches that come again and again.

A small step costs the host more time than the card: thousands of launches. A graph replays them at once, with the very
same kernels in the same order. The first two batches of a shape run launch by launch (kernels are compiled then), the
third is recorded and from then on replayed; a shape beyond MOST runs launch by launch, and so does everything if a
recording fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decal.data.batch import IGNORE, Batch
from decal.model.lean import embedded, in_one_function, run_layers
from decal.ops.loss import cross_entropy_of_rows
from decal.training import head, step
from decal.training.losses import SFT, Loss, shifted
from decal.training.precision import Precision

BEFORE = 2  # batches of a shape that run launch by launch
MOST = 4  # shapes that are recorded: each holds gradients of its own


FILL = 512


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A batch in shapes that come again: rows of the loss are filled up to a multiple of FILL with some of no loss."""

    inputs: Tensor  # token ids, or their embeddings
    rows: Tensor
    targets: Tensor

    @property
    def key(self) -> tuple[int, ...]:
        return (*self.inputs.shape, len(self.rows))

    def to(self, device: torch.device) -> Fixed:
        """Return it on the device."""
        inputs, rows, targets = (t.to(device, non_blocking=True) for t in (self.inputs, self.rows, self.targets))
        return Fixed(inputs=inputs, rows=rows, targets=targets)

    def write(self, other: Fixed) -> None:
        """Take the values of another of the same key."""
        self.inputs.copy_(other.inputs, non_blocking=True)
        self.rows.copy_(other.rows, non_blocking=True)
        self.targets.copy_(other.targets, non_blocking=True)


def fixed(body: nn.Module, batch: Batch) -> Fixed:
    """Return the batch in such a shape, on the host."""
    labels = shifted(batch.labels)
    live = labels != IGNORE
    rows, spare = live.nonzero().flatten(), (~live).nonzero().flatten()
    spare = spare[: -len(rows) % FILL]
    targets = torch.cat((labels[rows], torch.full_like(spare, -1)))
    return Fixed(inputs=embedded(body, batch.input_ids), rows=torch.cat((rows, spare)), targets=targets)


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Fixed
    total: Tensor
    loss: Tensor
    weights: list[nn.Parameter]
    gradients: list[Tensor]


class Graphs:
    """The backward passes of one training run on a card. `say` is told what runs otherwise than expected."""

    def __init__(self, precision: Precision, say: Callable[[str], object], *, before: int = BEFORE) -> None:
        self.precision = precision
        self.say = say
        self.before = before
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._failed = False

    def backward(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss: Loss,
        scaler: torch.amp.GradScaler,
        *,
        precision: Precision,
    ) -> Tensor:
        """Do what step.backward does."""
        if precision.device.type != "cuda" or self._failed:
            return step.backward(model, batches, loss, scaler, precision=precision)
        if self._stream is None:
            self._stream = torch.cuda.Stream(precision.device)  # type: ignore[no-untyped-call]  # torch's
        here = torch.cuda.current_stream(precision.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):  # all steps, because memory freed on one stream is of no use to another
            mean = self._backward(model, batches, loss, scaler)
        here.wait_stream(self._stream)
        return mean

    def forget(self) -> None:
        """Give up what is recorded: the layers keep other things from now on."""
        self._recorded.clear()
        self._seen.clear()
        self._pool = None

    def _backward(self, model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler) -> Tensor:
        if not self._may_record(model, batches, loss, scaler):
            return step.backward(model, batches, loss, scaler, precision=self.precision)
        device, (body, _) = self.precision.device, head.parts(model)
        total = torch.tensor(float(sum(loss.count(batch) for batch in batches)), device=device)
        mean = torch.zeros((), device=device)
        for batch in batches:
            if loss.count(batch) > 0:
                mean += self._one(model, fixed(body, batch), total, alone=len(batches) == 1)
        return mean

    def _may_record(self, model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler) -> bool:
        """Whether all is known to run on the card without a word from the host. The model shows it on a first pass."""
        if scaler.is_enabled() or not isinstance(loss, SFT) or not loss.chunked:
            return False
        if any(batch.position_ids is not None for batch in batches):
            return False
        if sum(loss.count(batch) for batch in batches) == 0:
            return False
        body, linear = head.parts(model)
        bias: Tensor | None = linear.bias
        longest = max(batch.input_ids.shape[1] for batch in batches)
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        return bias is None and not dropout and in_one_function(body, longest)

    def _one(self, model: nn.Module, batch: Fixed, total: Tensor, *, alone: bool) -> Tensor:
        """Add the gradient of one micro-batch, and return its share of the loss."""
        known = self._recorded.get(batch.key)
        self._seen[batch.key] += 1
        if known is None and self._seen[batch.key] > self.before and len(self._recorded) < MOST:
            known = self._record(model, batch, total)
        if known is None:
            return self._launched(model, batch.to(total.device), total)
        known.inputs.write(batch)
        known.total.copy_(total)
        known.graph.replay()
        for weight, gradient in zip(known.weights, known.gradients, strict=True):
            if weight.grad is None:
                weight.grad = gradient if alone else gradient.clone()  # the next replay writes over it
            else:
                weight.grad += gradient
        return known.loss.clone()

    def _launched(self, model: nn.Module, batch: Fixed, total: Tensor) -> Tensor:
        part = self._loss(model, batch, total)
        part.backward()  # type: ignore[no-untyped-call]  # torch's
        return part.detach()

    def _loss(self, model: nn.Module, batch: Fixed, total: Tensor) -> Tensor:
        body, linear = head.parts(model)
        with self.precision.autocast():
            hidden = run_layers(body, batch.inputs).flatten(0, 1)
            return cross_entropy_of_rows(hidden, head.weight_of(linear), batch.rows, batch.targets) / total

    def _record(self, model: nn.Module, batch: Fixed, total: Tensor) -> _Recorded | None:
        """Record the passes for batches of this shape; None where that fails."""
        weights = [p for p in model.parameters() if p.requires_grad]
        before = [p.grad for p in weights]
        inputs, total, graph = batch.to(total.device), total.clone(), torch.cuda.CUDAGraph()
        for weight in weights:
            weight.grad = None
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = self._launched(model, inputs, total)
            moved = [w for w in weights if w.grad is not None]
            gradients = [w.grad for w in moved if w.grad is not None]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._failed = True
            self.say(f"steps run launch by launch, because recording one failed: {str(error).splitlines()[0][:120]}")
            return None
        finally:
            for weight, gradient in zip(weights, before, strict=True):
                weight.grad = gradient
        self._recorded[batch.key] = _Recorded(graph, inputs, total, loss, moved, gradients)
        return self._recorded[batch.key]
