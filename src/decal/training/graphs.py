"""Forward and backward of a micro-batch as one CUDA graph, for shapes of batches that come again and again.

A small step costs the host more time than the card: thousands of launches. A graph replays them at once, with the very
same kernels in the same order. The first two batches of a shape run launch by launch (kernels are compiled then), the
third is recorded and from then on replayed; a run's very first batch goes through the model's own forward pass and
counts for none. Rows are filled up to widths that come again, as are the bounds of packed samples and the rows of the
loss. A shape beyond MOST runs launch by launch, and so does everything if a recording fails, or if recordings leave too
little memory for a step of another shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from decal.data.batch import IGNORE, Batch
from decal.model import direct
from decal.ops import workspace
from decal.ops.loss import check_targets, cross_entropy_of_rows
from decal.ops.segments import Segments
from decal.training import head, step
from decal.training.losses import SFT, Loss, longest, shifted
from decal.training.precision import Precision

BEFORE = 2  # batches of a shape that run launch by launch
MOST = 32  # shapes that are recorded; their activations share one pool of memory, and all add to the same gradients
FILL = 512  # rows of the loss come in multiples of it, with some of no loss
STEP = 64  # tokens; widths of rows come in multiples of it, longer ones of a sixteenth of the next power of two


def width_of(width: int) -> int:
    """Return what rows of `width` tokens are filled up to: at most an eighth, or STEP, more."""
    step = max(STEP, (1 << (width - 1).bit_length()) // 16)
    return -(-width // step) * step


def widened(batch: Batch) -> Batch:
    """Return the batch with padding at the right up to its `width_of`, none of it learnt."""
    more = width_of(batch.input_ids.shape[1]) - batch.input_ids.shape[1]
    if more == 0:
        return batch
    places = batch.position_ids
    if places is not None:
        places = torch.cat((places, torch.arange(more).expand(len(places), more)), 1)
    ids, labels = pad(batch.input_ids, (0, more)), pad(batch.labels, (0, more), value=IGNORE)
    return Batch(input_ids=ids, labels=labels, position_ids=places)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A batch in a shape that comes again."""

    inputs: Tensor  # token ids, or their embeddings
    rows: Tensor  # of the loss
    targets: Tensor
    places: Tensor | None  # of packed rows, with `where` their samples begin
    where: Segments | None

    @property
    def key(self) -> tuple[int, ...]:
        packed = (0, 0) if self.where is None else (len(self.where.bounds), self.where.reach)
        return (*self.inputs.shape, len(self.rows), *packed)

    def _tensors(self) -> list[Tensor]:
        packed = [] if self.places is None or self.where is None else [self.places, self.where.bounds]
        return [self.inputs, self.rows, self.targets, *packed]

    def to(self, device: torch.device) -> Fixed:
        """Return it on the device."""
        inputs, rows, targets, *packed = (x.to(device, non_blocking=True) for x in self._tensors())
        places, where = self.places, self.where
        if where is not None:
            places, where = packed[0], Segments(packed[1], where.longest)
        return Fixed(inputs=inputs, rows=rows, targets=targets, places=places, where=where)

    def write(self, other: Fixed) -> None:
        """Take the values of another of the same key."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)


def fixed(body: nn.Module, batch: Batch, vocabulary: int) -> Fixed:
    """Return the batch in such a shape, on the host. Raises DataError for a label outside the vocabulary."""
    batch = widened(batch)
    labels = shifted(batch.labels)
    live = labels != IGNORE
    rows, spare = live.nonzero().flatten(), (~live).nonzero().flatten()
    spare = spare[: -len(rows) % FILL]
    check_targets(labels[rows], vocabulary)
    return Fixed(
        inputs=direct.embedded(body, batch.input_ids),
        rows=torch.cat((rows, spare)),
        targets=torch.cat((labels[rows], torch.full_like(spare, -1))),
        places=batch.position_ids,
        where=batch.segments,
    )


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Fixed
    total: Tensor
    loss: Tensor
    buffers: tuple[Tensor, ...]  # whose addresses it knows


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
        self._moved: list[nn.Parameter] = []  # what a pass gives a gradient
        self._gradients: list[Tensor] = []  # theirs, which recordings add to
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
        try:
            return self._beside(model, batches, loss, scaler)
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
        self.forget()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        self._failed = True
        self.say("steps run launch by launch from here on: there is no room for one of another shape beside recordings")
        return self.backward(model, batches, loss, scaler, precision=precision)

    def forget(self) -> None:
        """Give up what is recorded: the layers keep other things from now on."""
        self._recorded.clear()
        self._seen.clear()
        self._gradients.clear()
        self._pool = None

    def _beside(self, model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler) -> Tensor:
        """Run all passes on one stream beside the usual one: memory freed on one is of no use to the other."""
        device = self.precision.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        here = torch.cuda.current_stream(device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            mean = self._backward(model, batches, loss, scaler)
        here.wait_stream(self._stream)
        return mean

    def _backward(self, model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler) -> Tensor:
        if not self._may_record(model, batches, loss, scaler):
            return step.backward(model, batches, loss, scaler, precision=self.precision)
        device, (body, linear) = self.precision.device, head.parts(model)
        total = torch.tensor(float(sum(loss.count(batch) for batch in batches)), device=device)
        mean = torch.zeros((), device=device)
        if self._gradients:
            self._lay_out()
        for batch in batches:
            if loss.count(batch) > 0:
                mean += self._one(model, fixed(body, batch, linear.out_features), total)
        return mean

    def _lay_out(self) -> None:
        torch._foreach_zero_(self._gradients)
        for weight, gradient in zip(self._moved, self._gradients, strict=True):
            weight.grad = gradient

    def _may_record(self, model: nn.Module, batches: Sequence[Batch], loss: Loss, scaler: torch.amp.GradScaler) -> bool:
        """Whether all is known to run on the card without a word from the host. The model shows it on a first pass."""
        if scaler.is_enabled() or not isinstance(loss, SFT) or not loss.chunked:
            return False
        if sum(loss.count(batch) for batch in batches) == 0:
            return False
        body, linear = head.parts(model)
        bias: Tensor | None = linear.bias
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        return bias is None and not dropout and direct.runs_directly(body, max(map(longest, batches)))

    def _one(self, model: nn.Module, batch: Fixed, total: Tensor) -> Tensor:
        """Add the gradient of one micro-batch, and return its share of the loss."""
        known = self._recorded.get(batch.key)
        self._seen[batch.key] += 1
        comes_again = self._seen[batch.key] > self.before and len(self._recorded) < MOST
        if known is None and comes_again and not self._failed:
            known = self._record(model, batch, total)
            if known is None:
                torch.cuda.empty_cache()  # what the recording took
        if known is None:
            part = self._launched(model, batch.to(total.device), total)
            self._moved = self._moved or [p for p in model.parameters() if p.grad is not None]
            return part
        known.inputs.write(batch)
        known.total.copy_(total)
        known.graph.replay()
        return known.loss.clone()

    def _launched(self, model: nn.Module, batch: Fixed, total: Tensor) -> Tensor:
        part = self._loss(model, batch, total)
        part.backward()  # type: ignore[no-untyped-call]  # torch's
        return part.detach()

    def _loss(self, model: nn.Module, batch: Fixed, total: Tensor) -> Tensor:
        body, linear = head.parts(model)
        with self.precision.autocast():
            hidden = direct.run(body, batch.inputs, batch.places, batch.where).flatten(0, 1)
            return cross_entropy_of_rows(hidden, head.weight_of(linear), batch.rows, batch.targets) / total

    def _record(self, model: nn.Module, batch: Fixed, total: Tensor) -> _Recorded | None:
        """Record the passes for batches of this shape; None where that fails."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._moved]
            for weight, gradient in zip(self._moved, self._gradients, strict=True):
                weight.grad = gradient
        inputs, total = batch.to(total.device), total.clone()
        try:
            graph, loss = self._capture(model, inputs, total)
        except RuntimeError as error:
            self.forget()
            direct.forget(head.parts(model)[0])
            self._failed = True
            why = "there is no room to record one"
            # The end of a recording that broke off may hide the reason.
            if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
                why = f"recording one failed: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
            self.say(f"steps run launch by launch, because {why}")
            return None
        self._recorded[batch.key] = _Recorded(graph, inputs, total, loss, workspace.held())
        return self._recorded[batch.key]

    def _capture(self, model: nn.Module, inputs: Fixed, total: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            loss = self._launched(model, inputs, total)
        return graph, loss
