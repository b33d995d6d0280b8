"""Products with frozen weights that share an input, each with a change s·B·A: y_i = x (W_i + s_i·B_i·A_i)ᵀ.

Forward and backward are explicit, so that what is shared is read once: one product with all A stacked, one sum of the
input's gradients, formed in the products themselves. A change is merged into the weight while it is decoded, or kept
apart (`merged`; layers/adapted.py says when which is exact); apart, a product's sum starts from the change, so that a
16-bit y does not round a young adapter away.

Shapes: N rows, D inputs, O outputs of one product, R ranks of all products together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from decal.ops import select, workspace
from decal.ops.dropout import Drop

T = TypeVar("T")
Factors = tuple[Tensor, Tensor] | None  # A (rank, D), B (O, rank) of one product


class Write(Protocol):
    """How a weight gets into `out` (O, D): as it is, or with factors and s·B·A.

    With `by`, (O, 1) or (1, D) in fp32, `out` has 8 bits and gets the product with it (ops/fp8.py).
    """

    def __call__(self, out: Tensor, factors: Factors, by: Tensor | None = None) -> object: ...


@dataclass(frozen=True)
class Product:
    """One frozen weight. `stored` is the weight itself where it is stored as it is; else `write` decodes it.

    `largest` bounds |W| in each row and each column. `drop` is what the adapter's input loses in this pass.
    """

    inputs: int
    outputs: int
    scale: float
    bias: Tensor | None
    stored: Tensor | None
    write: Write
    largest: Callable[[], tuple[Tensor, Tensor]]
    drop: Drop | None = None


@dataclass(frozen=True)
class Projected:
    """All A in the gradients' dtype (R, D), and s·dy B (N, R)."""

    A_RD: Tensor
    T_NR: Tensor


@dataclass(frozen=True)
class Group:
    """Products of the same input, their results side by side; none that drops something of it can be `merged`.

    Merged weights that are `stacked` are multiplied as one, at the price of a buffer for all of them.
    """

    products: tuple[Product, ...]
    merged: bool
    stacked: bool

    @property
    def outputs(self) -> list[int]:
        """The width of each product."""
        return [product.outputs for product in self.products]

    def parts(self, y_NO: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of each product."""
        return torch.split(y_NO, self.outputs, 1)

    def forward(self, x_ND: Tensor, factors: Sequence[Factors]) -> Tensor:
        """Return all products side by side, (N, all O)."""
        y_NO = x_ND.new_empty(len(x_ND), sum(self.outputs))
        if self.merged and self.stacked:
            torch.mm(x_ND, self._stacked(factors, x_ND).T, out=y_NO)
        else:
            A_RD, Bs = (None, []) if self.merged else _narrow(factors, x_ND)
            S_NR = None if A_RD is None else self._down(x_ND, A_RD, factors)
            for product, pair, out, columns, B in self._each(factors, self.parts(y_NO), Bs):
                if B is None or S_NR is None:
                    torch.mm(x_ND, self._weight(product, pair, x_ND).T, out=out)
                else:
                    torch.mm(S_NR[:, columns], B.T, out=out)
                    out.addmm_(x_ND, self._weight(product, None, x_ND).T)
        return self._biased(y_NO)

    def added(self, x_ND: Tensor, factors: Sequence[Factors], plus_NO: Tensor) -> Tensor | None:
        """Return plus + the only product, rounded once; None where that could round the change away."""
        (product,) = self.products
        if not self.merged and factors[0] is not None:
            return None
        return self._biased(torch.addmm(plus_NO, x_ND, self._weight(product, factors[0], x_ND).T))

    def project(self, dy_NO: Tensor, factors: Sequence[Factors]) -> Projected | None:
        """Return s·dy B of all products side by side, which both gradients are made of; None without factors."""
        A_RD, Bs = _narrow(factors, dy_NO)
        if A_RD is None:
            return None
        T_NR = dy_NO.new_empty(len(dy_NO), len(A_RD))
        for _, _, dy, columns, B in self._each(factors, self.parts(dy_NO), Bs):
            if B is not None:
                torch.mm(dy, B, out=T_NR[:, columns])
        return Projected(A_RD, self._scaled(T_NR, factors))

    def input_gradient(self, dy_NO: Tensor, factors: Sequence[Factors], projected: Projected | None) -> Tensor:
        """Return the gradient of x."""
        if self.merged and self.stacked:
            return torch.mm(dy_NO, self._stacked(factors, dy_NO))
        dx = None if self.merged or projected is None else self._back(projected, factors)
        for product, pair, dy in zip(self.products, factors, self.parts(dy_NO), strict=True):
            W = self._weight(product, pair if self.merged else None, dy)
            dx = torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)
        assert dx is not None, "a group has products"
        return dx

    def factor_gradients(
        self, dy_NO: Tensor, x_ND: Tensor, factors: Sequence[Factors], projected: Projected | None
    ) -> list[Factors]:
        """Return the gradients of A and B of each product."""
        if projected is None:
            return [None] * len(factors)
        S_NR = self._down(x_ND, projected.A_RD, factors)
        dA_RD = None if self.drops else _wide_mm(projected.T_NR.T, x_ND)
        found: list[Factors] = []
        for product, pair, dy, columns, _ in self._each(factors, self.parts(dy_NO), ()):
            if pair is None:
                found.append(None)
                continue
            T_NR = projected.T_NR[:, columns]
            dA = _wide_mm(T_NR.T, _dropped(product, x_ND)) if dA_RD is None else dA_RD[columns]
            found.append((dA, _wide_mm(dy.T, S_NR[:, columns])))
        return found

    @property
    def drops(self) -> bool:
        return any(product.drop is not None for product in self.products)

    def _biased(self, y_NO: Tensor) -> Tensor:
        """Add each product's bias to its columns, in place."""
        for product, out in zip(self.products, self.parts(y_NO), strict=True):
            if product.bias is not None:
                out += product.bias
        return y_NO

    def _down(self, x_ND: Tensor, A_RD: Tensor, factors: Sequence[Factors]) -> Tensor:
        """Return s·x Aᵀ of all products side by side, (N, R), each of what it does not drop."""
        if not self.drops:
            return self._scaled(x_ND @ A_RD.T, factors)
        S_NR = x_ND.new_empty(len(x_ND), len(A_RD))
        for product, pair, _, columns, _ in self._each(factors, self.products, ()):
            if pair is not None:
                torch.mm(_dropped(product, x_ND), A_RD[columns].T, out=S_NR[:, columns])
        return self._scaled(S_NR, factors)

    def _back(self, projected: Projected, factors: Sequence[Factors]) -> Tensor:
        """Return what the changes add to the gradient of x."""
        if not self.drops:
            return projected.T_NR @ projected.A_RD
        parts = [
            _dropped(product, projected.T_NR[:, columns] @ projected.A_RD[columns])
            for product, pair, _, columns, _ in self._each(factors, self.products, ())
            if pair is not None
        ]
        return functools.reduce(Tensor.add_, parts)

    def _each(
        self, factors: Sequence[Factors], things: Sequence[T], Bs: Sequence[Tensor]
    ) -> list[tuple[Product, Factors, T, slice, Tensor | None]]:
        """Return for each product: itself, its factors, its thing, its columns among the ranks, its narrow B."""
        found, first, narrow = [], 0, iter(Bs)
        for product, pair, thing in zip(self.products, factors, things, strict=True):
            rank = 0 if pair is None else len(pair[0])
            found.append((product, pair, thing, slice(first, first + rank), next(narrow, None) if rank else None))
            first += rank
        return found

    def _scaled(self, S_NR: Tensor, factors: Sequence[Factors]) -> Tensor:
        """Multiply each product's columns by its scale, in place."""
        live = [(p.scale, len(pair[0])) for p, pair in zip(self.products, factors, strict=True) if pair is not None]
        if len({scale for scale, _ in live}) == 1:
            return S_NR.mul_(live[0][0])
        for (scale, _), columns in zip(live, torch.split(S_NR, [rank for _, rank in live], 1), strict=True):
            columns.mul_(scale)
        return S_NR

    def _weight(self, product: Product, pair: Factors, like: Tensor) -> Tensor:
        """Return W, or with factors W + s·B·A, in the shared buffer unless it is stored as it is."""
        if pair is None and product.stored is not None and product.stored.dtype == like.dtype:
            return product.stored
        out = workspace.buffer((product.outputs, product.inputs), like.dtype, like.device)
        product.write(out, pair)
        return out

    def _stacked(self, factors: Sequence[Factors], like: Tensor) -> Tensor:
        """Return all merged weights, one above the other, in the shared buffer."""
        W = workspace.buffer((sum(self.outputs), self.products[0].inputs), like.dtype, like.device)
        for product, pair, rows in zip(self.products, factors, torch.split(W, self.outputs), strict=True):
            product.write(rows, pair)
        return W


def _dropped(product: Product, x: Tensor) -> Tensor:
    return x if product.drop is None else product.drop(x)


def _narrow(factors: Sequence[Factors], like: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Return all A stacked (R, D) and each B (O, rank), in `like`'s dtype; None and nothing without factors."""
    pairs = [pair for pair in factors if pair is not None]
    if not pairs:
        return None, []
    ranks = [len(A) for A, _ in pairs]
    A_RD = like.new_empty(sum(ranks), pairs[0][0].shape[1])
    Bs = [like.new_empty(B.shape) for _, B in pairs]
    torch._foreach_copy_([*torch.split(A_RD, ranks), *Bs], [A for A, _ in pairs] + [B for _, B in pairs])
    return A_RD, Bs


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, on a card in fp32 (the sum's own precision) where the inputs have 16 bits."""
    if select.habits(a.device) == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b).float()
    return a @ b
