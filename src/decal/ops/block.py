"""A whole decoder layer as one differentiable function: x + attention(norm(x)), then + MLP(norm(·)) (LLaMA's layer).

Its backward is written out, so that it keeps only what cannot be made again cheaply: x, the rotated queries, keys and
values, attention's output, the sum after it, gate and up. Norms, the MLP's product and merged weights are made again.
A layer may also keep x alone, on the card or on a shelf in host memory, and run again in backward; the last product,
which only the forward pass needs, is left out then. Where both results are normed before they are added (Gemma 3), they
are kept, too.

Shapes as in ops/regions.py and ops/products.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decal.ops import regions
from decal.ops.products import Factors, Group

Memory = Literal["keep", "recompute", "offload"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, S, E), k, v (B, kv, S, E) -> (B, S, H, E)


class Shelf(Protocol):
    """Where the inputs of layers wait for backward."""

    def put(self, x: Tensor) -> Any: ...
    def take(self, parked: Any) -> Tensor: ...


@dataclass(frozen=True)
class Norm:
    """An RMS norm with a frozen weight; `gemma` says which of two forms (ops/regions.py)."""

    weight: Tensor
    eps: float
    gemma: bool

    def __call__(self, x: Tensor) -> Tensor:
        return regions.rms_norm(x, self.weight, self.eps, self.gemma)

    def of_sum(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + y and its norm."""
        return regions.add_rms_norm(y, x, self.weight, self.eps, self.gemma)

    def plus(self, y: Tensor, x: Tensor) -> Tensor:
        """Return x + the norm of y."""
        return regions.plus_rms_norm(y, x, self.weight, self.eps, self.gemma)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        return regions.rms_norm_backward(dy, x, self.weight, self.eps, self.gemma)

    def backward_plus(self, dy: Tensor, x: Tensor, plus: Tensor) -> Tensor:
        return regions.rms_norm_backward_plus(dy, x, self.weight, self.eps, plus, self.gemma)


@dataclass(frozen=True)
class Block:
    """A layer's frozen parts, and where its x goes."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    before: tuple[Norm, Norm]  # attention, the MLP
    after: tuple[Norm, Norm] | None  # the same, before their results are added (Gemma 3)
    of_heads: tuple[Norm, Norm] | None  # of queries and keys (Qwen3, Gemma 3)
    heads: tuple[int, int]  # of queries, of keys
    width: int  # of a head
    activation: str
    attend: Attend
    memory: Memory
    shelf: Shelf

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return the MLP's product of gate and up, side by side."""
        gate, up = gate_up.chunk(2, 1)
        return regions.gated(gate, up, self.activation)

    def gated_backward_(self, dh: Tensor, gate_up: Tensor) -> None:
        """Write the MLP's product over dh, and the gradients of gate and up over these."""
        gate, up = gate_up.chunk(2, 1)
        regions.gated_backward_(dh, gate, up, self.activation)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass
class _State:
    """What backward reads, of one forward pass."""

    raw: Tensor | None  # q, k, v before their heads are normed, where they are
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor  # with the graph of attention, from q, k and v
    a: Tensor | None  # attention's result, where it is normed
    x2: Tensor
    gate_up: Tensor
    m: Tensor | None = None  # the MLP's result, where it is normed and kept

    def drop(self, *names: str) -> None:
        """Forget what has been used up, so that its memory is free before the layer is through."""
        for name in names:
            delattr(self, name)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Block, x: Tensor, cos: Tensor, sin: Tensor, *flat: Tensor | None) -> Tensor:
        factors = _by_group(block, flat)
        with torch.autocast(x.device.type, enabled=False):
            state = _run(block, x, cos, sin, factors, graph=block.memory == "keep")
            h = block.gated(state.gate_up)
            if block.after is None:
                y = block.down.added(h, factors[3], state.x2)
                if y is None:
                    y = block.down.forward(h, factors[3]).add_(state.x2)
            else:
                state.m = block.down.forward(h, factors[3])
                y = block.after[1].plus(state.m, state.x2)
        ctx.block, ctx.state, ctx.shape = block, state if block.memory == "keep" else None, x.shape
        ctx.parked = block.shelf.put(x) if block.memory == "offload" else None
        ctx.save_for_backward(None if block.memory == "offload" else x, cos, sin, *flat)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        x, cos, sin, *flat = ctx.saved_tensors
        if x is None:
            x = block.shelf.take(ctx.parked)
        state, ctx.state = ctx.state, None
        with torch.autocast(dy.device.type, enabled=False):
            factors = _by_group(block, flat)
            if state is None:
                state = _run(block, x, cos, sin, factors, graph=True)
            dx, gradients = _backward(block, dy, x, cos, sin, factors, state, wanted=ctx.needs_input_grad[1])
        return None, dx, None, None, *gradients


def layer(block: Block, x: Tensor, cos: Tensor, sin: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Return the layer's output (B, S, D). `factors` are A, B (or None, None) of q, k, v, o, gate, up and down."""
    out: Tensor = _Layer.apply(block, x, cos, sin, *factors)  # type: ignore[no-untyped-call]  # torch's is untyped
    return out


def _by_group(block: Block, flat: Sequence[Tensor | None]) -> list[list[Factors]]:
    pairs: list[Factors] = [
        None if A is None or B is None else (A, B) for A, B in zip(flat[::2], flat[1::2], strict=True)
    ]
    found, first = [], 0
    for group in block.groups:
        found.append(pairs[first : first + len(group.products)])
        first += len(group.products)
    return found


def _run(block: Block, x: Tensor, cos: Tensor, sin: Tensor, factors: list[list[Factors]], *, graph: bool) -> _State:
    """Run the layer up to gate and up; with `graph` attention can be differentiated."""
    x_ND = x.reshape(-1, x.shape[-1])
    query, kv = block.heads
    n = block.before[0](x_ND)
    raw = block.qkv.forward(n, factors[0])
    del n
    before = None
    if block.of_heads is not None:
        before, raw = raw, _norm_heads(block, raw)
    turned = regions.rotate(raw.view(*x.shape[:-1], query + 2 * kv, block.width), cos, sin, query + kv)
    del raw
    q, k, v = (part.transpose(1, 2).detach() for part in torch.split(turned, [query, kv, kv], 2))
    with torch.set_grad_enabled(graph):
        if graph:
            q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        o = block.attend(q, k, v)
    o_ND = o.detach().reshape(len(x_ND), -1)
    a, x2, n = _after_attention(block, o_ND, x_ND, factors[1])
    return _State(before, q, k, v, o, a, x2, block.gate_up.forward(n, factors[2]))


def _after_attention(
    block: Block, o_ND: Tensor, x_ND: Tensor, factors: Sequence[Factors]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return attention's result where it is normed, the sum with x, and what the MLP reads."""
    if block.after is not None:
        a = block.o.forward(o_ND, factors)
        x2 = block.after[0].plus(a, x_ND)
        return a, x2, block.before[1](x2)
    total = block.o.added(o_ND, factors, x_ND)
    if total is None:
        return None, *block.before[1].of_sum(block.o.forward(o_ND, factors), x_ND)
    return None, total, block.before[1](total)


def _norm_heads(block: Block, raw_NO: Tensor) -> Tensor:
    assert block.of_heads is not None, "the heads are normed"
    q, k = block.of_heads
    heads = raw_NO.view(len(raw_NO), -1, block.width)
    return regions.norm_heads(heads, q.weight, k.weight, q.eps, block.heads[0], q.gemma)


def _backward(
    block: Block,
    dy: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    factors: list[list[Factors]],
    state: _State,
    *,
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    x_ND, dy_ND = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
    dx2, of_mlp = _mlp_backward(block, dy_ND, factors, state)
    o_ND = state.o.detach().reshape(len(x_ND), -1)
    da = dx2 if block.after is None or state.a is None else block.after[0].backward(dx2, state.a)
    state.drop("a")
    projected = block.o.project(da, factors[1])
    do = block.o.input_gradient(da, factors[1], projected)
    of_o = block.o.factor_gradients(da, o_ND, factors[1], projected)
    del o_ND, da
    dq, dk, dv = torch.autograd.grad(state.o, (state.q, state.k, state.v), do.view(state.o.shape))
    state.drop("o", "q", "k", "v")
    dqkv = regions.rotate_backward(dq, dk, dv, cos, sin).view(len(x_ND), -1)
    del dq, dk, dv, do
    if block.of_heads is not None and state.raw is not None:
        dqkv = _before_head_norms(block, dqkv, state.raw)
        state.drop("raw")
    projected = block.qkv.project(dqkv, factors[0])
    n = block.before[0](x_ND)
    of_qkv = block.qkv.factor_gradients(dqkv, n, factors[0], projected)
    del n
    dx = None
    if wanted:
        dn = block.qkv.input_gradient(dqkv, factors[0], projected)
        del dqkv
        dx = block.before[0].backward_plus(dn, x_ND, dx2).view(x.shape)
    return dx, [part for pair in (*of_qkv, *of_o, *of_mlp) for part in (pair or (None, None))]


def _before_head_norms(block: Block, whole_NO: Tensor, raw_NO: Tensor) -> Tensor:
    """Return the gradient of q, k and v side by side, from that past the norms of heads."""
    assert block.of_heads is not None, "the heads are normed"
    q, k = block.of_heads
    d, raw = (t.view(len(t), -1, block.width) for t in (whole_NO, raw_NO))
    before = regions.norm_heads_backward(d, raw, q.weight, k.weight, q.eps, block.heads[0], q.gemma)
    return before.view(len(d), -1)


def _mlp_backward(
    block: Block, dy_ND: Tensor, factors: list[list[Factors]], state: _State
) -> tuple[Tensor, list[Factors]]:
    """Return the gradient of x2 and those of the factors of gate, up and down; uses up what it reads."""
    gate_up, x2, m = state.gate_up, state.x2, state.m
    state.drop("gate_up", "x2", "m")
    dm = dy_ND
    if block.after is not None:
        if m is None:
            m = block.down.forward(block.gated(gate_up), factors[3])
        dm = block.after[1].backward(dy_ND, m)
        del m
    projected = block.down.project(dm, factors[3])
    dh = block.down.input_gradient(dm, factors[3], projected)
    block.gated_backward_(dh, gate_up)  # dh is the MLP's product from here on, and gate_up its gradients
    of_down = block.down.factor_gradients(dm, dh, factors[3], projected)
    del dh, dm
    projected = block.gate_up.project(gate_up, factors[2])
    n = block.before[1](x2)
    of_gate_up = block.gate_up.factor_gradients(gate_up, n, factors[2], projected)
    del n
    dn = block.gate_up.input_gradient(gate_up, factors[2], projected)
    del gate_up
    dx2 = block.before[1].backward_plus(dn, x2, dy_ND)
    return dx2, [*of_gate_up, *of_down]
