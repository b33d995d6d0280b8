"""The watch over a run: what it sees in losses, gradients and weights, said once as advice that can be acted on.

It only looks: no weight, generator or data position depends on it, so a watched run gives the very bits of an unwatched
one. What it remembers is in the checkpoint, so a resumed run does not say a thing twice and stops where it would have.
Every kind of advice, with what it measures and what to do, is in docs/watch.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from decal.layers.coded import uncounted
from decal.spec import TrainConfig
from decal.training import anatomy, movement, signals
from decal.training.step import StepResult
from decal.words import counted

LOOKS = (3, 10, 30, 100)  # steps after which the weights are read, then every hundredth: below 0.1% of the time
PATIENT = 30  # steps: an expert that no token was sent to in three steps is nothing odd
STALLED = 0.3  # of the entries. In bf16 89% of A at 2e-5, 14% at 2e-4; in fp32 none (docs/watch.md)
GAP = 20  # steps between two looks from which `stalled` may be told
NEAR_TOP = 0.5  # of the highest rate: at the ends of a schedule every rate is small
USUAL = {"lora": (1e-4, 5e-4), "full": (1e-5, 1e-4)}  # learning rates of large models; small ones bear more
LARGE = 1e9  # parameters


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One line for the user; each kind is said once in a run."""

    kind: str
    text: str


@dataclass(kw_only=True)
class Memory:
    """What the watch has seen; plain values, for the checkpoint."""

    said: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # losses
    losses: list[float] = field(default_factory=list)  # of the last steps
    norms: list[float] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    high_since: int | None = None  # the first of the steps on end whose loss is above all of the start's
    above_since: int | None = None  # the first of the steps on end whose loss is above the first two
    flat_since: int | None = None  # the first of the steps on end whose gradient is zero
    best: float | None = None  # the lowest median loss of a window, and the step it ended at
    best_step: int = 0
    evaluations: list[list[float]] = field(default_factory=list)  # step, loss, mean training loss since the last one
    since: list[float] = field(default_factory=list)  # sum and number of training losses since the last evaluation

    @classmethod
    def of(cls, values: dict[str, Any]) -> Memory:
        """Return what a checkpoint remembers. Raises TypeError for values that are not of the kind."""
        memory = cls(**values)
        numbers: list[Any] = [*memory.first, *memory.losses, *memory.norms, *memory.skips, *memory.since]
        numbers += [number for one in memory.evaluations for number in one]
        numbers += [memory.best or 0, memory.best_step]
        numbers += [step or 0 for step in (memory.high_since, memory.above_since, memory.flat_since)]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError("what the watch remembers must be numbers")
        return memory


class Watch:
    """Looks at a run's steps and evaluations. `diverged` is the step at which it went wrong, once that is certain."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        memory: Memory,
        *,
        warmup: int = 0,
    ) -> None:
        self.memory = memory
        self.diverged: int | None = None
        self.reason = ""  # of that, in words
        self._model, self._config, self._warmup = model, config, warmup
        self._large = sum(p.numel() for p in model.parameters()) + uncounted(model) >= LARGE
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._dtypes = {name: p.dtype for name, p in self._named}
        self._rates = {name: group["initial_lr"] for group in optimizer.param_groups for name in group["names"]}
        self._start = self._last = movement.look(self._named)
        self._taken = self._last_taken = 0  # steps of this sitting that could move something
        self._top = self._last_top = 0.0  # the highest share of the rate since the start, since the last look

    def begin(self) -> Iterator[Advice]:
        """What can be said before the first step."""
        yield from self._once("scale", anatomy.scale(self._model))
        yield from self._once("frozen", anatomy.frozen(self._model))

    def step(self, number: int, result: StepResult, *, share: float) -> Iterator[Advice]:
        """What a step taken at that share of the highest rate says."""
        self._remember(number, result)
        self.diverged = None
        yield from self._once("diverged", self._divergence(number))
        if "diverged" not in self.memory.said:
            yield from self._once("spike", self._spike(number))
            yield from self._once("gradient", self._gradient(number, result))
            yield from self._once("clipping", self._clipping())
        yield from self._once("skipped", self._skipped())
        if not result.skipped and share > 0:
            self._taken += 1
            self._top, self._last_top = max(self._top, share), max(self._last_top, share)
            if self._taken in LOOKS or self._taken % LOOKS[-1] == 0:
                yield from self._look()

    def evaluation(self, number: int, loss: float) -> Iterator[Advice]:
        """What an evaluation says."""
        memory = self.memory
        if memory.evaluations and memory.evaluations[-1][0] == number:
            return
        total, count = memory.since or (0.0, 0)
        memory.since = []
        memory.evaluations.append([number, loss, total / count if count else loss])
        yield from self._once("diverged", self._lost(number))
        yield from self._once("overfit", self._overfit())
        yield from self._once("modes", anatomy.wake(self._model))

    @property
    def lr(self) -> float:
        return self._config.lr

    @property
    def suspicious(self) -> bool:
        """Whether the run may be about to be called diverged: older checkpoints may still be needed."""
        return self.began_badly is not None

    @property
    def began_badly(self) -> int | None:
        """The first step of those that look diverged so far."""
        seen = (self.memory.high_since, self.memory.above_since, self.memory.flat_since)
        return min((step for step in seen if step is not None), default=None)

    @property
    def began_at(self) -> float | None:
        """The validation loss before the first step."""
        first = self.memory.evaluations[0] if self.memory.evaluations else None
        return first[1] if first is not None and first[0] == 0 else None

    def _once(self, kind: str, text: str | None) -> Iterator[Advice]:
        if text is not None and kind not in self.memory.said:
            self.memory.said.append(kind)
            yield Advice(kind=kind, text=text)

    def _remember(self, number: int, result: StepResult) -> None:
        memory = self.memory
        if len(memory.first) < signals.FIRST:
            memory.first.append(result.loss)
        memory.losses = [*memory.losses, result.loss][-(signals.WINDOW + signals.STAYS) :]
        memory.skips = [*memory.skips, int(result.skipped)][-signals.SKIP_WINDOW :]
        if not result.skipped:
            memory.norms = [*memory.norms, result.grad_norm][-signals.CLIP_WINDOW :]
        total, count = memory.since or (0.0, 0)
        memory.since = [total + result.loss, count + 1]
        over = signals.over(memory.first)
        memory.high_since = _since(memory.high_since, number, result.loss > signals.blown(memory.first))
        memory.above_since = _since(memory.above_since, number, over is not None and result.loss > over)
        memory.flat_since = _since(memory.flat_since, number, result.grad_norm == 0)

    def _divergence(self, number: int) -> str | None:
        memory, since = self.memory, None
        if memory.high_since is not None and number - memory.high_since + 1 >= signals.LONG:
            since = memory.high_since
            limit = signals.blown(memory.first)
            what = f"the loss has been above {limit:.2f}, worse than at the start, since step {since}"
        elif memory.above_since is not None and signals.above(memory.losses, memory.first):
            since = memory.above_since
            start = max(memory.first[: signals.BEFORE])
            what = f"the loss is {memory.losses[-1]:.2f}, above the {start:.2f} it began with, since step {since}"
        elif memory.flat_since is not None and number - memory.flat_since + 1 >= signals.LONG:
            since = memory.flat_since
            what = f"the gradient has been zero since step {since}, so nothing is learnt any more"
        elif len(memory.losses) >= signals.WINDOW:
            middle = signals.spread(memory.losses[-signals.WINDOW :])[0]
            if memory.best is None or middle < memory.best:
                memory.best, memory.best_step = middle, number
            elif signals.returned(memory.losses, memory.best, memory.first):
                since = memory.best_step + 1
                what = f"the loss is back at {middle:.2f}, from {memory.best:.2f} at step {memory.best_step}"
        return None if since is None else self._diverged(since, what)

    def _lost(self, number: int) -> str | None:
        began, seen = self.began_at, [(loss, train) for step, loss, train in self.memory.evaluations if step > 0]
        if began is None or not seen or not signals.worse_than_start(seen, began):
            return None
        good = [step for step, loss, _ in self.memory.evaluations if loss <= began]
        what = f"the held-out loss is {seen[-1][0]:.2f}, above the {began:.2f} of step 0"
        return self._diverged(int(max(good)) + 1, what)

    def _diverged(self, since: int, what: str) -> str:
        self.diverged, self.reason = since, what
        return f"diverged: {what}; {self._lower()}"

    def _spike(self, number: int) -> str | None:
        found = signals.spike(self.memory.losses, self.memory.first[:5])
        if found is None:
            return None
        return f"the loss jumped to {found[0]:.2f} from about {found[1]:.2f} at step {number}: {self._lower()}"

    def _gradient(self, number: int, result: StepResult) -> str | None:
        if result.skipped or number <= self._warmup:
            return None
        found = signals.norm_spike(self.memory.norms, self._config.max_grad_norm)
        if found is None:
            return None
        return (
            f"the gradient's norm jumped to {found[0]:.3g} from about {found[1]:.3g} at step {number} and was cut to "
            f"{self._config.max_grad_norm:g}: look at that batch's rows; if it happens again, lower "
            f"train.max_grad_norm or train.lr ({self.lr:g})"
        )

    def _clipping(self) -> str | None:
        limit = self._config.max_grad_norm
        usual = signals.clipped(self.memory.norms, limit)
        if usual is None:
            return None
        return (
            f"nearly every step is clipped: the gradient's norm is about {usual:.3g}, train.max_grad_norm {limit:g}; "
            f"raise it to {2 * usual:.3g}, or lower train.lr ({self.lr:g})"
        )

    def _skipped(self) -> str | None:
        count = signals.skipped(self.memory.skips)
        if count is None:
            return None
        return (
            f"{count} of {signals.SKIP_WINDOW} steps skipped, for their fp16 gradients overflowed: use "
            f"train.precision=bf16 or fp32, or lower train.lr ({self.lr:g})"
        )

    def _overfit(self) -> str | None:
        seen = self.memory.evaluations
        if not signals.overfit([(loss, train) for step, loss, train in seen if step > 0]):
            return None
        best = min(seen, key=lambda one: one[1])
        lora = "; or raise lora_dropout (0.05 to 0.1), lower lora.r" if self._config.method == "lora" else ""
        return (
            f"overfitting: the held-out loss rose to {seen[-1][1]:.3f} from {best[1]:.3f} at step {best[0]:.0f} while "
            f"the training loss fell to {seen[-1][2]:.3f}: train for fewer epochs, or set train.early_stopping{lora}"
        )

    def _look(self) -> Iterator[Advice]:
        now = movement.look(self._named)
        top = {name: rate * self._top for name, rate in self._rates.items()}
        unmoved = movement.unmoved(self._start, now, top, self._dtypes)
        yield from self._once(
            "dead", anatomy.dead(unmoved, list(self._dtypes), self._taken, patient=self._taken >= PATIENT)
        )
        if self._taken - self._last_taken >= GAP and self._last_top >= NEAR_TOP:
            recent = {name: rate * self._last_top for name, rate in self._rates.items()}
            shares = movement.stalled(self._last, now, recent, self._dtypes)
            group = max(shares, key=lambda one: shares[one])
            if shares[group] >= STALLED:
                yield from self._once("stalled", self._stall(group, shares[group]))
        yield from self._once("modes", anatomy.wake(self._model))
        self._last, self._last_taken, self._last_top = now, self._taken, 0.0

    def _stall(self, group: str, share: float) -> str:
        names = {self._dtypes[name] for name, _ in self._named if movement.group_of(name) == group}
        kind = ", ".join(sorted(str(name).removeprefix("torch.") for name in names))
        return (
            f"{share:.0%} of the entries of the {group} stood still over {self._taken - self._last_taken} steps: at "
            f"train.lr={self.lr:g} a step is rounded away in {kind}; keep adapters in fp32 "
            "(autocast_adapter_dtype=True) or raise train.lr"
        )

    def _lower(self) -> str:
        """What to do about weights that were thrown too far."""
        low, high = USUAL[self._config.method]
        if self.lr > 10 * high:
            usual = f"; {low:g} to {high:g} is usual from 1B parameters on" if self._large else ""
            return f"lower train.lr ({self.lr:g}{usual}), to a tenth or less"
        return (
            f"lower train.lr ({self.lr:g}) or train.max_grad_norm ({self._config.max_grad_norm:g}), or lengthen "
            f"train.warmup ({counted(self._warmup, 'step')})"
        )


def _since(before: int | None, number: int, holds: bool) -> int | None:
    """Return the first of the steps on end for which something holds."""
    if not holds:
        return None
    return number if before is None else before
