"""A whole decoder layer as one differentiable function: x + attention(norm(x)), then + MLP(norm(·)) (LLaMA's layer).

Its backward is written out, so that it keeps only what cannot be made again cheaply: x, the rotated queries, keys and
values, attention's output, the sum after it, gate and up. Norms, the MLP's product and merged weights are made again.
A layer may also keep x alone, on the card or on a shelf in host memory, and run again in backward; the last product,
which only the forward pass needs, is left out then.

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
class Block:
    """A layer's frozen parts, and where its x goes."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    head_norms: tuple[Tensor, Tensor, float] | None  # of queries and keys, and their epsilon (Qwen3)
    heads: tuple[int, int]  # of queries, of keys
    width: int  # of a head
    activation: str
    attend: Attend
    memory: Memory
    shelf: Shelf

    @property
    def columns(self) -> list[int]:
        """The widths of all queries, all keys and all values of a row."""
        query, kv = self.heads
        return [query * self.width, kv * self.width, kv * self.width]

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
    x2: Tensor
    gate: Tensor
    up: Tensor

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
            h = regions.gated(state.gate, state.up, block.activation)
            y = block.down.added(h, factors[3], state.x2)
            if y is None:
                y = _alone(block.down, h, factors[3]).add_(state.x2)
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


def _alone(group: Group, x_ND: Tensor, factors: Sequence[Factors]) -> Tensor:
    out = x_ND.new_empty(len(x_ND), group.products[0].outputs)
    group.forward(x_ND, factors, [out])
    return out


def _run(block: Block, x: Tensor, cos: Tensor, sin: Tensor, factors: list[list[Factors]], *, graph: bool) -> _State:
    """Run the layer up to gate and up; with `graph` attention can be differentiated."""
    x_ND = x.reshape(-1, x.shape[-1])
    query, kv = block.heads
    n = regions.rms_norm(x_ND, block.norms[0], block.eps[0])
    raw = n.new_empty(len(n), (query + 2 * kv) * block.width)
    block.qkv.forward(n, factors[0], torch.split(raw, block.columns, 1), raw)
    del n
    before = None
    if block.head_norms is not None:
        before, raw = raw, regions.norm_heads(raw.view(len(x_ND), -1, block.width), *block.head_norms, query)
    turned = regions.rotate(raw.view(*x.shape[:-1], query + 2 * kv, block.width), cos, sin, query + kv)
    del raw
    q, k, v = (part.transpose(1, 2).detach() for part in torch.split(turned, [query, kv, kv], 2))
    with torch.set_grad_enabled(graph):
        if graph:
            q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        o = block.attend(q, k, v)
    o_ND = o.detach().reshape(len(x_ND), -1)
    x2 = block.o.added(o_ND, factors[1], x_ND)
    if x2 is None:
        x2, n = regions.add_rms_norm(_alone(block.o, o_ND, factors[1]), x_ND, block.norms[1], block.eps[1])
    else:
        n = regions.rms_norm(x2, block.norms[1], block.eps[1])
    gate, up = (n.new_empty(len(n), product.outputs) for product in block.gate_up.products)
    block.gate_up.forward(n, factors[2], [gate, up])
    return _State(before, q, k, v, o, x2, gate, up)


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
    projected = block.o.project([dx2], factors[1])
    do = block.o.input_gradient([dx2], factors[1], projected)
    of_o = block.o.factor_gradients([dx2], o_ND, factors[1], projected)
    del o_ND
    dq, dk, dv = torch.autograd.grad(state.o, (state.q, state.k, state.v), do.view(state.o.shape))
    state.drop("o", "q", "k", "v")
    whole = regions.rotate_backward(dq, dk, dv, cos, sin).view(len(x_ND), -1)
    del dq, dk, dv, do
    if block.head_norms is not None and state.raw is not None:
        whole = _before_head_norms(block, whole, state.raw)
        state.drop("raw")
    dqkv = torch.split(whole, block.columns, 1)
    projected = block.qkv.project(dqkv, factors[0])
    n = regions.rms_norm(x_ND, block.norms[0], block.eps[0])
    of_qkv = block.qkv.factor_gradients(dqkv, n, factors[0], projected)
    del n
    dx = None
    if wanted:
        dn = block.qkv.input_gradient(dqkv, factors[0], projected, whole)
        del whole, dqkv
        dx = regions.rms_norm_backward_plus(dn, x_ND, block.norms[0], block.eps[0], dx2).view(x.shape)
    return dx, [part for pair in (*of_qkv, *of_o, *of_mlp) for part in (pair or (None, None))]


def _before_head_norms(block: Block, whole_NO: Tensor, raw_NO: Tensor) -> Tensor:
    """Return the gradient of q, k and v side by side, from that past the norms of heads."""
    assert block.head_norms is not None, "the heads are normed"
    d, raw = (t.view(len(t), -1, block.width) for t in (whole_NO, raw_NO))
    return regions.norm_heads_backward(d, raw, *block.head_norms, block.heads[0]).view(len(d), -1)


def _mlp_backward(
    block: Block, dy_ND: Tensor, factors: list[list[Factors]], state: _State
) -> tuple[Tensor, list[Factors]]:
    """Return the gradient of x2 and those of the factors of gate, up and down; uses gate, up and x2 up."""
    gate, up, x2 = state.gate, state.up, state.x2
    state.drop("gate", "up", "x2")
    projected = block.down.project([dy_ND], factors[3])
    dh = block.down.input_gradient([dy_ND], factors[3], projected)
    regions.gated_backward_(dh, gate, up, block.activation)  # dh is the MLP's product from here on
    of_down = block.down.factor_gradients([dy_ND], dh, factors[3], projected)
    del dh
    projected = block.gate_up.project([gate, up], factors[2])
    n = regions.rms_norm(x2, block.norms[1], block.eps[1])
    of_gate_up = block.gate_up.factor_gradients([gate, up], n, factors[2], projected)
    del n
    dn = block.gate_up.input_gradient([gate, up], factors[2], projected)
    del gate, up
    dx2 = regions.rms_norm_backward_plus(dn, x2, block.norms[1], block.eps[1], dy_ND)
    return dx2, [*of_gate_up, *of_down]
