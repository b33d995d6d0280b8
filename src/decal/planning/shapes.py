"""Run decal's own step on tensors without values, and see every byte that it takes.

The model is built from its configuration, stored, adapted and set as training would do it; then forward, loss, backward
and optimizer step run under torch's fake tensors, which have shapes and no memory. So each model family, method,
storage format and way of recomputing is counted by the code that will run, not by a formula.

All tensors lie on the CPU: torch cannot hold fake ones of a card that is not there. Inside the run decal's code and
the kernels' table take the ways of the planned device. Layers that are alike are counted once: two models that differ
by one period of their layers give what each further period adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from decal.data.batch import IGNORE, Batch
from decal.evaluate.loss import evaluating
from decal.model.lean import lean
from decal.ops import adam8, select, workspace
from decal.planning import empty
from decal.planning.traced import Block, Trace, live_at, peak
from decal.planning.wanted import Wanted
from decal.training import adamw8bit, head, optim, step
from decal.training.adamw8bit import AdamW8bit
from decal.training.losses import SFT
from decal.training.precision import Precision

FROZEN, EDGES, TRAINED, GRADIENTS = "frozen weights", "embeddings and head", "trained weights", "gradients"
OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE = "optimizer", "activations", "logits", "workspace"
PARTS = (FROZEN, EDGES, TRAINED, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE)

STEP_8BIT = 32  # bytes for each element of AdamW8bit's pieces: gradient, weight, both moments and the search of codes


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What lives at the peak of one stretch of a step, in bytes by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One step, counted. `moments` are the peaks of its stretches in their order; work of all its micro-batches."""

    moments: tuple[Moment, ...]
    flops: float
    moved: float  # bytes, by what is no matrix product
    operations: float

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def plus(self, other: Counted, times: float) -> Counted:
        """Return self + times * (other - self), stretch by stretch."""

        def mixed(a: float, b: float) -> float:
            return a + times * (b - a)

        return Counted(
            moments=tuple(
                Moment(parts={part: mixed(a.parts[part], b.parts[part]) for part in PARTS})
                for a, b in zip(self.moments, other.moments, strict=True)
            ),
            flops=mixed(self.flops, other.flops),
            moved=mixed(self.moved, other.moved),
            operations=mixed(self.operations, other.operations),
        )


def training_step(model: Any, wanted: Wanted) -> Counted:
    """Count one step of training in its steady state: the optimizer's states are there. `model` is empty.trainable's.

    It is counted at two small depths, and the line is drawn on to all layers.
    """
    kinds = empty.alike(model)
    small, large = empty.depths(kinds)
    first = _count(model, wanted, depth=small, upper=large - small)
    if small == large:
        return first
    return first.plus(_count(model, wanted, depth=large, upper=large - small), (len(kinds) - small) / (large - small))


def evaluation(model: Any, wanted: Wanted) -> Counted:
    """Count the evaluation of one micro-batch, without the weights: what it holds beside them knows no depth."""
    depth, _ = empty.depths(empty.alike(model))
    return _count(model, wanted, depth=depth, trains=False)


def _count(model: Any, wanted: Wanted, *, depth: int, upper: int = 1, trains: bool = True) -> Counted:
    rows = batch(wanted)
    with empty.cut(model, depth), _without_values(), empty.lifted(model):
        return _Run(model=model, wanted=wanted, batch=rows, upper=max(upper, 1)).count(trains=trains)


@contextmanager
def _without_values() -> Iterator[None]:
    """Make tensors without values in the block, which leaves no trace in global state."""
    state = torch.get_rng_state()
    try:
        with workspace.apart(), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_rng_state(state)


@dataclass
class _Run:
    """One run of a step at one depth. `upper` layers are as many as a period has."""

    model: Any
    wanted: Wanted
    batch: Batch
    upper: int
    begun: list[int] = field(default_factory=list)  # when each layer's forward began
    back: list[int] = field(default_factory=list)  # when each layer's backward began, the last layer first
    edges: list[int] = field(default_factory=list)  # between the other stretches
    watching: bool = True

    def __post_init__(self) -> None:
        self.trace = Trace(card=self.wanted.device == "cuda")
        self.precision = Precision(name=self.wanted.numbers, device=torch.device("cpu"))
        self.loss = SFT(chunked=chunks(self.model))
        self.vocabulary = _vocabulary(self.model)

    def count(self, *, trains: bool) -> Counted:
        with select.planned(self.wanted.device), lean(self.model), self._watched(), self.trace:
            self._see_weights()
            optimizer = self._optimizer() if trains else None
            self.trace.start()
            self.edges.append(self.trace.now)
            if optimizer is None:
                with evaluating(self.model), self.precision.autocast():
                    self.loss(self.model, self.batch)
            else:
                self._train(optimizer)
            self.edges.append(self.trace.now)
        return self._counted()

    def _see_weights(self) -> None:
        edges = {id(p) for p in _edges(self.model)}
        for parameter in self.model.parameters():
            frozen = EDGES if id(parameter) in edges else FROZEN
            self.trace.see(parameter, TRAINED if parameter.requires_grad else frozen)
        for buffer in self.model.buffers():
            self.trace.see(buffer, FROZEN)

    def _optimizer(self) -> Any:
        """Return the optimizer as a first step leaves it."""
        optimizer = optim.build(self.model, self.wanted.train)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        if isinstance(optimizer, AdamW8bit):
            optimizer.make_states([p for group in optimizer.param_groups for p in group["params"]])
        else:
            optimizer.step()
        for state in optimizer.state.values():
            for value in state.values():
                self.trace.see(value, OPTIMIZER)
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    def _train(self, optimizer: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        rounds = 2 if self.wanted.train.accumulate > 1 else 1  # in the second, gradients are there from the start
        for number in range(rounds):
            self.watching = number == rounds - 1
            self.edges[0] = self.trace.start()
            step.backward(self.model, [self.batch], self.loss, scaler, precision=self.precision)
            for p in self.model.parameters():
                if p.grad is not None:
                    self.trace.see(p.grad, GRADIENTS)
        self.edges.append(self.trace.now)
        weights = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        torch.nn.utils.clip_grads_with_norm_(weights, self.wanted.train.max_grad_norm, norm)
        if isinstance(optimizer, AdamW8bit):
            _step_8bit(weights)
        else:
            optimizer.step()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note when each layer's forward and backward begin."""
        seen: set[int] = set()

        def begins(module: nn.Module, inputs: Any) -> None:
            if self.watching and id(module) not in seen:
                seen.add(id(module))
                self.begun.append(self.trace.now)

        def turns(_: Tensor) -> None:
            if self.watching:
                self.back.append(self.trace.now)

        def ends(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(turns)

        handles: list[Any] = []
        for layer in empty.layers(self.model):
            handles += [layer.register_forward_pre_hook(begins), layer.register_forward_hook(ends)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _counted(self) -> Counted:
        begin, *rest = self.edges
        cuts = [begin]
        if self.begun:
            cuts.append(self.begun[0])
        if self.back:
            cuts += [self.back[0], self.back[min(self.upper, len(self.back) - 1)]]
        cuts += rest
        moments = tuple(self._moment(first, last) for first, last in pairwise(cuts))
        trace = self.trace
        return Counted(moments=moments, flops=trace.flops, moved=trace.moved, operations=trace.now - begin)

    def _moment(self, first: int, last: int) -> Moment:
        _, when = peak(self.trace.blocks, first, last)
        parts = dict.fromkeys(PARTS, 0.0)
        for block in live_at(self.trace.blocks, when):
            parts[self._part(block, when)] += block.bytes
        return Moment(parts=parts)

    def _part(self, block: Block, when: int) -> str:
        """Return what a block is: named, or judged by its life and shape."""
        if block.part is not None:
            return block.part
        if block.shape and block.shape[-1] == self.vocabulary:
            return LOGITS
        outlives = block.died is not None and self.back and block.born <= self.back[0] < block.died
        return ACTIVATIONS if outlives or when < block.born else WORKSPACE


def chunks(model: nn.Module) -> bool:
    """Return whether the loss would keep logits from existing whole, as far as a configuration tells."""
    return head.why_not_by_form(model) is None


def batch(wanted: Wanted) -> Batch:
    """Return a micro-batch of the wanted shape, with values: labels and positions are looked at."""
    shape = (wanted.train.micro_batch, wanted.length)
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.zeros(shape, dtype=torch.long)
    if wanted.loss_rows is not None:
        labels.view(-1)[wanted.loss_rows + 1 :] = IGNORE  # a row's first label is no target
    positions = None
    if wanted.packed and wanted.length > 1:
        half = wanted.length // 2
        row = torch.cat([torch.arange(half), torch.arange(wanted.length - half)])
        positions = row.expand(shape).contiguous()
    return Batch(input_ids=ids, labels=labels, position_ids=positions, samples=shape[0])


def _edges(model: Any) -> list[nn.Parameter]:
    """Return the parameters of the embeddings and the head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [p for end in ends if end is not None for p in end.parameters() if not p.requires_grad]


def _vocabulary(model: Any) -> int:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    size: int = inner.config.get_text_config().vocab_size
    return size


def _step_8bit(weights: list[nn.Parameter]) -> None:
    """Take what AdamW8bit's step takes for itself: it looks codes up, which nothing without values can do."""
    elements = min(sum(p.numel() for p in weights), adamw8bit.RUN * adam8.BLOCK)
    torch.empty(STEP_8BIT * elements, dtype=torch.uint8)
