"""A budget of a card's memory, spent on keeping activations: what does not fit is computed again in backward.

Every decoder layer that runs as one function (layers/block.py) keeps what its backward reads, or its input alone, on
the card or in host memory. A run begins with the least, measures one warm step, and then spends what is left: layers
keep everything from the last one down (their memory is free again when the first ones run backward), and of the others
as many inputs as fit stay on the card. After four more steps the plan is corrected by what they took. The allocator is
told the limit, so that a step beyond it fails, and is run again with less kept, rather than takes more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decal.data.batch import Batch
from decal.errors import ConfigError, RunError
from decal.layers.block import LeanBlock
from decal.ops.loss import CHUNK
from decal.spec import RunConfig
from decal.training.graphs import width_of
from decal.training.losses import Loss
from decal.training.precision import Precision
from decal.training.step import Backward

GIB = 2**30
UNITS = {"kib": 2**10, "mib": 2**20, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}
FREE = "free"  # the setting that means all that the card has free
CONTEXT = 0.6 * GIB  # of a CUDA context with its libraries, where it cannot be measured
LARGEST_CONTEXT = 1.5 * GIB  # what is more than this is of other processes, too
SPARE = 0.02  # of the budget: blocks of the allocator that no tensor fills
WARM, SETTLED = 2, 4  # steps after which the plan is made, and corrected


def parse(text: str) -> int | None:
    """Return the bytes of a size such as "8GiB" or "7.5 GB", None for FREE. Raises ConfigError."""
    if text.strip() == FREE:
        return None
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGkmg][iI]?[bB])\s*", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            "train.memory must be a size with its unit, or free",
            got=repr(text),
            fix="Write for example train.memory=8GiB.",
        )
    return int(float(found[1]) * UNITS[found[2].lower()])


def limit_of(text: str, device: torch.device) -> int:
    """Return the bytes that a setting means on `device`. Raises ConfigError."""
    found = parse(text)
    return there_on(device) if found is None else found


def there_on(device: torch.device) -> int:
    """Return the bytes of the card that this process has, or could have."""
    return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + context_on(device))


def context_on(device: torch.device) -> float:
    """Return what CUDA and its libraries hold on the card besides torch's memory; they load more as they go."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return others if 0 < others <= LARGEST_CONTEXT else CONTEXT


class NoRoom(RunError):
    """A step needs more than its budget, whatever is kept; smaller micro-batches may do (training/halving.py)."""


@dataclass(frozen=True)
class Plan:
    """How many layers keep everything (the last ones), and how many of the others keep their input on the card."""

    keep: int
    inputs: int

    def modes(self, layers: int) -> list[str]:
        """Return each layer's memory, the first layer first."""
        others = layers - self.keep
        return ["offload"] * (others - self.inputs) + ["recompute"] * self.inputs + ["keep"] * self.keep


def fill(room: float, *, layers: int, kept: float, given: float) -> Plan:
    """Return the plan that spends `room` bytes beyond what layers with their inputs on the host need.

    A layer that keeps everything costs `kept` bytes, one with its input on the card `given`.
    """
    keep = max(0, min(layers, int(room // kept)))
    inputs = max(0, min(layers - keep, int((room - keep * kept) // given)))
    return Plan(keep, inputs)


def wants_embedding_on_host(model: nn.Module, config: RunConfig, device: torch.device) -> bool:
    """Whether the least that a step needs fits the budget only without the embedding's table on the card.

    By arithmetic, before the first step: gradients and states of the optimizer, one layer in backward, one chunk of
    logits. The table takes a batch's rows over to the card at every step, so that it stays there if it can.
    """
    if config.train.memory is None or device.type != "cuda":
        return False
    sizes: Any = getattr(model, "config", None)
    width, inner = getattr(sizes, "hidden_size", 0), getattr(sizes, "intermediate_size", 0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = trainable * (4 + (3 if "8bit" in config.train.optimizer else 8))
    layer = 2 * tokens_of(config) * (10 * width + 3 * inner) + 4 * width * inner
    logits = 2 * CHUNK["cuda"] * getattr(sizes, "vocab_size", 0)
    least = torch.cuda.memory_allocated(device) + states + layer + logits + CONTEXT
    return least > (1 - SPARE) * limit_of(config.train.memory, device)


def tokens_of(config: RunConfig, largest: Batch | None = None) -> int:
    """Return the tokens of the largest micro-batch (where it is not known, that may be), as its rows are filled up."""
    length = config.data.max_length if largest is None else largest.input_ids.shape[1]
    return config.train.micro_batch * (width_of(length) if config.train.cuda_graphs else length)


@contextmanager
def spent(
    model: nn.Module, config: RunConfig, numbers: Precision, *, tokens: int, say: Callable[[str], object]
) -> Iterator[Budget | None]:
    """Yield the budget of a run whose layers have been swapped (model/lean.py); the limit holds inside the block.

    None without a budget, or where it cannot be kept, which is said. `tokens` are those of the largest micro-batch.
    """
    device, limit = numbers.device, config.train.memory
    blocks = [module for module in model.modules() if isinstance(module, LeanBlock)]
    if limit is None:
        yield None
    elif device.type != "cuda":
        say("train.memory bounds a CUDA card's memory; here it changes nothing")
        yield None
    elif not blocks or any(block.why_general(numbers.dtype) is not None for block in blocks):
        say(
            "train.memory changes nothing: it chooses what layers keep that run as one function each "
            "(docs/performance.md)"
        )
        yield None
    else:
        spend = Budget(model, limit_of(limit, device), tokens=tokens, numbers=numbers, say=say)
        try:
            yield spend
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device.index)


class Budget:
    """The memory of one run on a card."""

    def __init__(
        self, model: nn.Module, limit: int, *, tokens: int, numbers: Precision, say: Callable[[str], object]
    ) -> None:
        """`tokens` are those of the largest micro-batch, `limit` is in bytes."""
        self.layers = [module for module in model.modules() if isinstance(module, LeanBlock)]
        self.tokens, self.device, self.say = tokens, numbers.device, say
        self.size = numbers.dtype.itemsize
        there = there_on(self.device)
        if there < limit:
            say(f"{there / GIB:.2f} GiB of the card's memory are free, less than train.memory: they are the budget")
        self.limit = min(limit, there)
        self._begin()

    def context(self) -> float:
        """Return what the card holds besides torch's memory."""
        return context_on(self.device)

    def guarded(self, run: Backward, forget: Callable[[], object]) -> Backward:
        """Return `run`, which starts anew with less kept where it runs out of memory. `forget` undoes recordings."""

        def backward(
            model: nn.Module,
            batches: Sequence[Batch],
            loss: Loss,
            scaler: torch.amp.GradScaler,
            *,
            precision: Precision,
        ) -> Tensor:
            while True:
                try:
                    return run(model, batches, loss, scaler, precision=precision)
                except torch.OutOfMemoryError:
                    pass
                forget()
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                self._less()

        return backward

    def halved(self) -> None:
        """Note that micro-batches have half the tokens from here on: what is kept is chosen anew by what they take."""
        self.tokens = -(-self.tokens // 2)
        self._begin()

    def stepped(self, forget: Callable[[], object]) -> None:
        """Note a finished step; make or correct the plan where it is time."""
        self.steps += 1
        if self.steps == WARM - 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.steps == WARM:
            peak = torch.cuda.max_memory_allocated(self.device)
            self._bound()
            room = (1 - SPARE) * self.limit - self.context() - peak
            self._choose(fill(room, layers=len(self.layers), kept=self._kept(), given=self._input()), forget)
        elif self.steps == WARM + SETTLED:
            self._bound()
            room = (1 - SPARE) * self.limit - self.context() - torch.cuda.memory_reserved(self.device)
            if room < 0 or (room >= self._input() and not self.ran_out):
                room += self.plan.keep * self._kept() + self.plan.inputs * self._input()
                plan = fill(room, layers=len(self.layers), kept=self._kept(), given=self._input())
                if plan != self.plan:
                    self._choose(plan, forget)

    def _begin(self) -> None:
        """Begin with the least, to measure what is left of the limit."""
        self.steps, self.ran_out = 0, False
        self.plan = Plan(0, 0)
        self._set(self.plan)
        torch.cuda.empty_cache()
        self._bound()

    def _choose(self, plan: Plan, forget: Callable[[], object]) -> None:
        self.plan = plan
        self._set(plan)
        forget()
        torch.cuda.empty_cache()
        others = len(self.layers) - plan.keep
        self.say(
            f"of {len(self.layers)} layers {plan.keep} keep their activations, {others} are computed again in backward"
            f" ({others - plan.inputs} with their inputs in host memory), for a budget of {self.limit / GIB:.2f} GiB"
        )

    def _less(self) -> None:
        """Keep less than now. Raises NoRoom where nothing is left to give up."""
        if self.plan.keep == 0 and self.plan.inputs == 0:
            least = torch.cuda.max_memory_reserved(self.device) + self.context()
            raise NoRoom(
                "the budget cannot be met: with every layer computed again and its input in host memory a step still "
                "needs more",
                got=f"train.memory={self.limit / GIB:.2f} GiB, and more than {least / GIB:.2f} GiB asked for",
                fix="Shorten data.max_length, or use train.optimizer=adamw8bit or quantize=nf4.",
            )
        self.ran_out = True
        down = max(1, self.plan.keep // 8)
        plan = Plan(self.plan.keep - down, self.plan.inputs) if self.plan.keep else Plan(0, self.plan.inputs // 2)
        self.say("a step ran out of memory and is run again with less kept")
        self._choose(plan, lambda: None)

    def _bound(self) -> None:
        """Tell torch's allocator the limit."""
        total = torch.cuda.mem_get_info(self.device)[1]
        share = min(1.0, max(0, self.limit - self.context()) / total)
        torch.cuda.set_per_process_memory_fraction(share, self.device.index)

    def _set(self, plan: Plan) -> None:
        for layer, memory in zip(self.layers, plan.modes(len(self.layers)), strict=True):
            layer.memory = memory  # type: ignore[assignment]  # one of Memory's words

    def _kept(self) -> int:
        return self.tokens * self.layers[0].kept_bytes(self.size)

    def _input(self) -> int:
        return self.tokens * self.layers[0].input_bytes(self.size)
