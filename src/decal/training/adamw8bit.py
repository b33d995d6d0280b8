"""AdamW with states of 8 bits (ops/adam8.py) as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adamw import adamw

from decal.ops import adam8
from decal.ops.adam8 import BLOCK, Moments

SMALLEST = 4096  # elements: tensors below keep fp32 states, as in bitsandbytes
RUN = 1 << 14  # blocks moved by one call: 2^22 elements, whose fp32 temporaries take some 0.1 GiB
SLOTS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")  # in the order of Moments


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
            self._step_wide(group, [p for p in moved if p.numel() < SMALLEST])
            alike: dict[int, list[nn.Parameter]] = {}  # by their count of steps, which is all but always the same
            for p in moved:
                if p.numel() >= SMALLEST:
                    self.state[p]["step"] += 1
                    alike.setdefault(int(self.state[p]["step"]), []).append(p)
            for step, parameters in alike.items():
                for run in runs(parameters, RUN):
                    self._step_coded(group, run, step)
        return loss

    def make_states(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the states of the parameters that have none yet."""
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(_wide(p) if p.numel() < SMALLEST else _coded(p))

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

    def _step_coded(self, group: dict[str, Any], run: list[tuple[nn.Parameter, int, int]], step: int) -> None:
        """Move blocks [first, last) of each parameter, all in one call: a card is slow at many small ones."""
        moved, moments = adam8.adamw(
            torch.cat([_cut(p.detach(), first, last) for p, first, last in run]),
            torch.cat([_cut(p.grad, first, last) for p, first, last in run if p.grad is not None]),
            Moments(*(torch.cat([self.state[p][s][a:b].flatten() for p, a, b in run]) for s in SLOTS)),
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        sizes = [last - first for _, first, last in run]
        rows = [moved.view(-1, BLOCK), moments.m.view(-1, BLOCK), moments.m_absmax]
        rows += [moments.v.view(-1, BLOCK), moments.v_absmax]
        split = zip(run, *(x.split_with_sizes(sizes) for x in rows), strict=True)
        for (p, first, last), values, *states in split:
            target = p.detach().view(-1)[first * BLOCK : last * BLOCK]
            target.copy_(values.flatten()[: len(target)])
            for slot, state in zip(SLOTS, states, strict=True):
                self.state[p][slot][first:last] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state_dict` with its dtypes: torch would cast the codes to the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            for slot, value in state_dict["state"].get(number, {}).items():
                self.state[p][slot] = value.clone() if slot == "step" else value.to(p.device, copy=True)


def runs(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[tuple[nn.Parameter, int, int]]]:
    """Yield the parameters' blocks as (parameter, first, last) in lists of at most `limit` blocks together."""
    run: list[tuple[nn.Parameter, int, int]] = []
    room = limit
    for p in parameters:
        first, blocks = 0, _blocks(p)
        while first < blocks:
            last = min(blocks, first + room)
            run.append((p, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield run
                run, room = [], limit
    if run:
        yield run


def _blocks(p: Tensor) -> int:
    return -(-p.numel() // BLOCK)


def _cut(x: Tensor, first: int, last: int) -> Tensor:
    """Return blocks [first, last) of a tensor, flat, in fp32, the last block of all filled up with zeros."""
    values = x.reshape(-1)[first * BLOCK : last * BLOCK].float()
    return F.pad(values, (0, (last - first) * BLOCK - len(values)))


def _wide(p: Tensor) -> dict[str, Tensor]:
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _coded(p: Tensor) -> dict[str, Tensor]:
    p.data = p.data.contiguous()  # blocks are cut out of the flat tensor
    state = {"step": torch.zeros(())}
    for slot in SLOTS:
        if slot.endswith("absmax"):
            state[slot] = torch.zeros(_blocks(p), device=p.device)
        else:
            state[slot] = torch.zeros(_blocks(p), BLOCK, dtype=torch.uint8, device=p.device)
    return state
