"""Experts that a model stores in one 3-D parameter, each expert's matrix in codes of its own.

The module stands in the parameter's place, and the model's own code goes on using it as that code does a tensor:
F.linear(x, experts[i]), or x @ experts[i] where a matrix is stored as (in, out). Nothing dense is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decal.errors import Unsupported
from decal.layers.coded import Coded, CodedBase, CodedLinear

ALIGN = 16  # bytes: each expert's codes and scales begin where kernels read whole words, and scales can be fp32


class CodedExperts(Coded):
    """A frozen parameter (experts, out, in), or (experts, in, out) where `one` is transposed.

    Codes and scales are (experts, bytes). `one` describes the matrix of an expert and holds no bytes. Blocks never
    reach over two experts, and each has its own doubly quantised scales, as if it were a linear layer.
    """

    one: CodedLinear

    def __init__(self, one: CodedLinear, count: int, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.__dict__["one"] = one  # not a submodule: its parameters are not the model's
        self.count = count
        self.weights = count * one.weights
        self.reserve((count, _padded(one.weight.numel())), (count, _padded(one.scales.numel())), device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the parameter that this stands for."""
        one = self.one
        sizes = (one.in_features, one.out_features) if one.transposed else (one.out_features, one.in_features)
        return (self.count, *sizes)

    def expert(self, i: int) -> CodedLinear:
        """Return expert i's matrix as a layer on views of its bytes."""
        codes, scales = self.weight.detach()[i], self.scales.detach()[i]
        return self.one.over(codes[: self.one.weight.numel()], scales[: self.one.scales.numel()])

    def matrix(self, W: Tensor, i: int) -> Tensor:
        """Return expert i's matrix (out, in) in a wide tensor of this parameter's shape."""
        return W[i].T if self.one.transposed else W[i]

    def encode(self, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return the bytes of codes and of scales for W, a tensor of this parameter's shape. Raises DecalError."""
        codes, scales = (torch.zeros(p.shape, dtype=p.dtype, device=W.device) for p in (self.weight, self.scales))
        for i in range(self.count):
            of_codes, of_scales = self.one.encode(self.matrix(W, i), f"{name}[{i}]")
            codes[i, : len(of_codes)] = of_codes
            scales[i, : len(of_scales)] = of_scales
        return codes, scales

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded parameter, in its own shape."""
        W = torch.empty(self.shape, dtype=dtype, device=self.weight.device)
        for i in range(self.count):
            self.matrix(W, i).copy_(CodedBase(self.expert(i)).dense(dtype))
        return W

    def __getitem__(self, index: int | Tensor) -> Matrix:
        if isinstance(index, Tensor) and index.dim() > 0:
            raise Unsupported(
                "coded experts are used one at a time, and this experts implementation takes several",
                fix="Call model.set_experts_implementation('eager').",
            )
        return Matrix(self.expert(int(index)))

    def extra_repr(self) -> str:
        return f"experts={self.count}, each {type(self.one).__name__}({self.one.extra_repr()})"


class Matrix:
    """One expert's matrix where model code expects a tensor: a frozen right factor, and nothing else."""

    def __init__(self, layer: CodedLinear) -> None:
        self.layer = layer

    def times(self, x: Tensor) -> Tensor:
        """Return x Wᵀ, (..., in) -> (..., out)."""
        return CodedBase(self.layer).matmul(x)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        x, matrix, *bias = args if len(args) > 1 else (None, None)
        if isinstance(matrix, cls) and isinstance(x, Tensor) and not kwargs:
            if func is F.linear and not matrix.layer.transposed:
                y = matrix.times(x)
                return y if not bias or bias[0] is None else y + bias[0].to(y.dtype)
            if func in PRODUCTS and matrix.layer.transposed:
                return matrix.times(x)
        raise Unsupported(
            f"a coded expert's matrix can only be multiplied with, and the model calls {func.__name__}",
            fix="Load it with quantize.allow_dense=true and these experts' name in quantize.skip.",
        )


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
