"""AdamW with states of 8 bits (ops/adam8.py) as a torch optimizer.

An adapter has hundreds of small tensors: a card moves them all in the time that the host takes for a few hundred calls.
So the states of tensors that move together lie side by side in memory, and a step reads and writes one view of them.
Where they do not (some have no gradient, or began later) they are gathered and written back, with equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from decal.ops import adam8
from decal.ops.adam8 import BLOCK, Moments
from decal.training.stretches import side_by_side, stretches

SMALLEST = 4096  # elements: tensors below keep fp32 states, as in bitsandbytes
RUN = 1 << 14  # blocks moved by one call: 2^22 elements, whose fp32 temporaries take some 0.1 GiB
TOGETHER, ALONE = 34, 30  # bytes of them for each element: a tensor alone with whole blocks is not gathered first
SLOTS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")  # in the order of Moments

Part = tuple[nn.Parameter, int, int]  # blocks [first, last) of a parameter


class AdamW8bit(torch.optim.Optimizer):
    """AdamW at 2.03 bytes of state per parameter in place of 8; parameters and arithmetic stay fp32.

    A tensor of at least 4096 elements holds `exp_avg` and `exp_avg_sq` as codes (blocks, 256) uint8 with
    `exp_avg_absmax` and `exp_avg_sq_absmax` (blocks,) fp32; a smaller one is torch's AdamW. Blocks never reach over
    the end of a tensor, so its results do not depend on what else is trained.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            self.make_states(moved)
            small = [p for p in moved if p.numel() < SMALLEST]
            if small:
                self._step_wide(group, small)
            for step, parameters in self._counted([p for p in moved if p.numel() >= SMALLEST]).items():
                for run in runs(parameters, RUN):
                    self._step_coded(group, run, step)
        return loss

    def make_states(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the states of the parameters that have none yet, those of one call side by side."""
        new = [p for p in parameters if not self.state[p]]
        small, coded = [p for p in new if p.numel() < SMALLEST], [p for p in new if p.numel() >= SMALLEST]
        for p, step in zip([*coded, *small], torch.zeros(len(new)).unbind(), strict=True):
            self.state[p]["step"] = step
        for p in small:
            self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        for together in wholes(coded, RUN):
            sizes = [blocks for _, _, blocks in together]
            for slot in SLOTS:
                scales = slot.endswith("absmax")
                shape, dtype = ((), torch.float32) if scales else ((BLOCK,), torch.uint8)
                flat = torch.zeros(sum(sizes), *shape, dtype=dtype, device=together[0][0].device)
                for (p, _, _), rows in zip(together, flat.split_with_sizes(sizes), strict=True):
                    self.state[p][slot] = rows

    def _counted(self, parameters: list[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
        """Count one step of each parameter; return them by their counts, which are all but always the same."""
        alike: dict[int, list[nn.Parameter]] = {}
        if parameters:
            steps = _lying([self.state[p] for p in parameters], "step")
            torch._foreach_add_(steps, 1)
            for p, step in zip(parameters, _one(steps).tolist(), strict=True):
                alike.setdefault(int(step), []).append(p)
        return alike

    def _step_wide(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_coded(self, group: dict[str, Any], run: list[Part], step: int) -> None:
        """Move blocks [first, last) of each parameter, all in one call: a card is slow at many small ones."""
        for p, _, _ in run:
            if not p.is_contiguous():  # blocks are cut out of the flat tensor, and written into it
                p.data = p.data.contiguous()
        weights = [p.view(-1) for p, _, _ in run]
        gradients = [p.grad.reshape(-1) for p, _, _ in run if p.grad is not None]
        held = [self.state[p] for p, _, _ in run]
        if len(run) == 1:
            ((_, first, last),) = run
            weights, gradients = [[x[first * BLOCK : last * BLOCK] for x in flat] for flat in (weights, gradients)]
            states = [[held[0][slot][first:last].view(-1)] for slot in SLOTS]
        else:  # no parameter of several is cut
            states = [_lying(held, slot) for slot in SLOTS]
        sizes = [(last - first) * BLOCK for _, first, last in run]
        moved, moments = adam8.adamw(
            _filled(weights, sizes),
            _filled(gradients, sizes),
            Moments(*(_one(views) for views in states)),
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        _write(weights, moved, sizes)
        for views, values in zip(states, moments, strict=True):
            _write(views, values, [view.numel() for view in views])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state_dict` with its dtypes: torch would cast the codes to the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            for slot, value in state_dict["state"].get(number, {}).items():
                self.state[p][slot] = (
                    value.clone()
                    if slot == "step"
                    else value.to(p.device, copy=True, memory_format=torch.contiguous_format)
                )


def wholes(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[Part]]:
    """Yield the parameters in lists of at most `limit` blocks together; a larger one is alone."""
    whole: list[Part] = []
    room = limit
    for p in parameters:
        blocks = -(-p.numel() // BLOCK)
        if whole and blocks > room:
            yield whole
            whole, room = [], limit
        whole.append((p, 0, blocks))
        room -= blocks
    if whole:
        yield whole


def runs(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[Part]]:
    """Yield the parameters' blocks in lists of at most `limit` together; a larger one is alone, and cut."""
    for whole in wholes(parameters, limit):
        p, _, blocks = whole[0]
        if blocks <= limit:
            yield whole
        else:
            yield from ([(p, first, min(first + limit, blocks))] for first in range(0, blocks, limit))


def step_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Return the most bytes that a step along fp32 gradients takes for itself, of what is moved in codes."""
    most = 0
    for run in runs([p for p in parameters if p.numel() >= SMALLEST], RUN):
        blocks, (p, _, end) = sum(last - first for _, first, last in run), run[0]
        gathered = len(run) > 1 or end * BLOCK > p.numel()
        most = max(most, (TOGETHER if gathered else ALONE) * blocks * BLOCK)
    return most


def _lying(states: list[dict[str, Tensor]], slot: str) -> list[Tensor]:
    """Return one of the states of each parameter as flat views: a single one, unless some lie elsewhere."""
    views = stretches([state[slot] for state in states])
    if len(views) > 1:
        for state, value in zip(states, side_by_side([state[slot] for state in states]), strict=True):
            state[slot] = value
        views = stretches([state[slot] for state in states])
    return views


def _one(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _filled(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    """Return flat tensors as one in fp32, each filled up with zeros to its size."""
    lengths = [tensor.numel() for tensor in tensors]
    if lengths == sizes:
        return _one(tensors).float()
    parts: list[Tensor] = []
    for tensor, length, size in zip(tensors, lengths, sizes, strict=True):
        parts += [tensor, tensor.new_zeros(size - length)] if length < size else [tensor]
    return _one(parts).float()


def _write(tensors: list[Tensor], values: Tensor, sizes: list[int]) -> None:
    """Write values, of which each tensor has its size, into the tensors; what is beyond a tensor's end is dropped."""
    parts, lengths = list(values.split_with_sizes(sizes)), [tensor.numel() for tensor in tensors]
    if lengths != sizes:
        parts = [x[:length] if length < x.numel() else x for x, length in zip(parts, lengths, strict=True)]
    torch._foreach_copy_(tensors, parts)
