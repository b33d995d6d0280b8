"""Run decal's own step on tensors without values, and see every byte that it takes.

The model is built from its configuration, stored, adapted and set as training would do it; then forward, loss, backward
and optimizer step run under torch's fake tensors, which have shapes and no memory. So each model family, method,
storage format and way of recomputing is counted by the code that will run, not by a formula.

All tensors lie on the CPU: torch cannot hold fake ones of a card that is not there. Inside the run decal's code and
the kernels' table take the ways of the planned device. Of layers that are alike, three are counted and the
middle one stands for the others (deepen.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from decal.data.batch import IGNORE, Batch
from decal.model.evaluating import evaluating
from decal.model.lean import lean
from decal.ops import fuse, select, workspace
from decal.planning import empty
from decal.planning.autocast import AsOnACard
from decal.planning.deepen import Middle, deepened
from decal.planning.traced import Block, Trace, live_at, peak
from decal.planning.wanted import Wanted
from decal.training import adamw8bit, head, optim, step
from decal.training.adamw8bit import AdamW8bit
from decal.training.losses import SFT
from decal.training.precision import Precision

FROZEN, EDGES, TRAINED, GRADIENTS = "frozen weights", "embeddings and head", "trained weights", "gradients"
OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE = "optimizer", "activations", "logits", "workspace"
PARTS = (FROZEN, EDGES, TRAINED, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One step, counted: what lived when, and its work. Weights and states were there at its beginning."""

    blocks: list[Block]
    first: int  # operation
    last: int
    parts: dict[str, int]  # at the peak, in bytes
    flops: float
    moved: float  # bytes, by what is no matrix product
    operations: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def training_step(model: Any, wanted: Wanted) -> Counted:
    """Count one step of training once the optimizer's states are there. `model` is that of empty.trainable."""
    return _count(model, wanted, trains=True)


def evaluation(model: Any, wanted: Wanted) -> Counted:
    """Count the evaluation of one micro-batch between two steps, without the optimizer's states."""
    return _count(model, wanted, trains=False)


def _count(model: Any, wanted: Wanted, *, trains: bool) -> Counted:
    rows, depth = batch(wanted), empty.depth(empty.alike(model))
    with empty.cut(model, depth.layers), _without_values(), empty.lifted(model):
        return _Run(model=model, wanted=wanted, batch=rows, depth=depth).count(trains=trains)


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
    """One run of a step, at a depth that stands for the whole."""

    model: Any
    wanted: Wanted
    batch: Batch
    depth: empty.Depth
    begun: list[int] = field(default_factory=list)  # when each layer's forward began
    back: list[int] = field(default_factory=list)  # when each layer's backward began, the last layer first
    first: int = 0  # when the step began
    ended: int = 0  # when its backward, or evaluation, ended

    def __post_init__(self) -> None:
        self.trace = Trace(card=self.wanted.device == "cuda")
        self.precision = Precision(name=self.wanted.numbers, device=torch.device("cpu"))
        self.loss = SFT(chunked=chunks(self.model))
        self.vocabulary = _vocabulary(self.model)
        stands = list(empty.layers(self.model))[slice(*self.depth.middle)]
        self.middle = {id(p) for layer in stands for p in layer.parameters()}

    def count(self, *, trains: bool) -> Counted:
        planned, seen = select.planned(self.wanted.device), fuse.seen_by(self.trace)
        ways = AsOnACard() if self.wanted.device == "cuda" else nullcontext()
        with planned, seen, lean(self.model), self._watched(), ways, self.trace:
            self._see_weights()
            optimizer = self._optimizer() if trains else None
            self.first = self.trace.now
            if optimizer is None:
                with evaluating(self.model), self.precision.autocast():
                    self.loss(self.model, self.batch)
                self.ended = self.trace.now
            else:
                self._train(optimizer)
        return self._counted()

    def _see_weights(self) -> None:
        edges = {id(p) for p in _edges(self.model)}
        for parameter in self.model.parameters():
            frozen = EDGES if id(parameter) in edges else FROZEN
            part = TRAINED if parameter.requires_grad else frozen
            self.trace.see(parameter, part, middle=id(parameter) in self.middle)
        for buffer in self.model.buffers():
            self.trace.see(buffer, FROZEN)

    def _optimizer(self) -> Any:
        """Return the optimizer as a first step leaves it."""
        optimizer = optim.build(self.model, self.wanted.train)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for p in weights:
            p.grad = torch.empty_like(p)
        if isinstance(optimizer, AdamW8bit):
            for p in weights:  # one by one: tensors made together share a storage, and here some stand for others
                optimizer.make_states([p])
        else:
            optimizer.step()
        for p, state in optimizer.state.items():
            for value in state.values():
                self.trace.see(value, OPTIMIZER, middle=id(p) in self.middle)
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    def _train(self, optimizer: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if self.wanted.train.accumulate > 1:  # from the second micro-batch on, gradients are there from the start
            for p in weights:
                p.grad = torch.empty_like(p)
                self.trace.see(p.grad, GRADIENTS, middle=id(p) in self.middle)
        self.first = self.trace.now
        step.backward(self.model, [self.batch], self.loss, scaler, precision=self.precision)
        for p in weights:
            if p.grad is not None:
                self.trace.see(p.grad, GRADIENTS)
        self.ended = self.trace.now
        weights = [p for p in weights if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        torch.nn.utils.clip_grads_with_norm_(weights, self.wanted.train.max_grad_norm, norm)
        if isinstance(optimizer, AdamW8bit):
            # It looks codes up, which nothing without values can do.
            taken = [adamw8bit.step_bytes(self._of_all_layers(group["params"])) for group in optimizer.param_groups]
            torch.empty(max(taken), dtype=torch.uint8)
        else:
            optimizer.step()

    def _of_all_layers(self, weights: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the weights that move, those of the middle as often as there are layers like it."""
        found: list[nn.Parameter] = []
        for middle, some in groupby((p for p in weights if p.grad is not None), key=lambda p: id(p) in self.middle):
            found += list(some) * (1 + self.depth.copies * middle)
        return found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note when each layer's forward and backward begin."""
        seen: set[int] = set()

        def begins(module: nn.Module, inputs: Any) -> None:
            if id(module) not in seen:
                seen.add(id(module))
                self.begun.append(self.trace.now)

        def turns(_: Tensor) -> None:
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
        trace, middle = self.trace, self._middle()
        back_from = self.back[0] if self.back else self.ended
        blocks = deepened(trace.blocks, middle, back_from=back_from)
        last = middle.moved(trace.now)
        _, when = peak(blocks, self.first, last)
        turned = middle.moved(back_from - 1) + 1
        parts = dict.fromkeys(PARTS, 0)
        for block in live_at(blocks, when):
            parts[self._part(block, turned)] += block.bytes
        return Counted(
            blocks=blocks,
            first=self.first,
            last=last,
            parts=parts,
            flops=self._work(trace.flops, middle),
            moved=self._work(trace.moved, middle),
            operations=last - self.first,
        )

    def _middle(self) -> Middle:
        """Return where the layers lie that stand for others."""
        (low, high), count = self.depth.middle, self.depth.layers
        seen = len(self.begun) == count and len(self.back) in (0, count)
        assert seen or not self.depth.copies, "each layer's forward and backward begin once"
        if not self.depth.copies:
            return Middle(forward=(0, 0), backward=(self.trace.now + 1,) * 2, copies=0)
        backward = (self.ended, self.ended)
        if self.back:
            backward = (self.back[count - high], self.back[count - low])
        return Middle(forward=(self.begun[low], self.begun[high]), backward=backward, copies=self.depth.copies)

    def _work(self, done: list[tuple[int, int]], middle: Middle) -> int:
        stretches = (middle.forward, middle.backward)
        return sum(
            work * (1 + middle.copies * any(first < when <= last for first, last in stretches))
            for when, work in done
            if when > self.first
        )

    def _part(self, block: Block, turned: int) -> str:
        """Return what a block is: named, or judged by its life and shape."""
        if block.part is not None:
            return block.part
        if block.shape and block.shape[-1] == self.vocabulary:
            return LOGITS
        kept = block.born < turned and (block.died is None or turned < block.died)
        return ACTIVATIONS if kept and self.back else WORKSPACE


def chunks(model: nn.Module) -> bool:
    """Return whether the loss would keep logits from existing whole, as far as a configuration tells."""
    reason = head.why_not_by_form(model)
    if reason is not None:
        head.refuse_coded(model, reason)
    return reason is None


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
    return Batch(input_ids=ids, labels=labels, position_ids=positions)


def _edges(model: Any) -> list[nn.Parameter]:
    """Return the parameters of the embeddings and the head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [p for end in ends if end is not None for p in end.parameters() if not p.requires_grad]


def _vocabulary(model: Any) -> int:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    size: int = inner.config.get_text_config().vocab_size
    return size
