"""The law of the two seams, for every adapter on every format: delta(x, y, base) == x @ delta_weight(base).T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.layers.catalog import ADAPTERS, EMBEDDING_ADAPTERS, FORMATS
from decal.layers.coded import CodedLinear
from decal.layers.embedding import EmbeddingBase, EmbeddingLoRA
from decal.layers.lora import LoRA
from decal.layers.streamed import StreamedLinear
from decal.model import quantized
from decal.spec import LoraConfig

IN, OUT = 12, 20
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "residual": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}


def filled(layer: CodedLinear) -> CodedLinear:
    """Return the layer with a random weight in its codes."""
    return quantized.fill(layer, *layer.encode(torch.randn(OUT, IN), "W"), "W")


def layer_of(kind: type[nn.Module]) -> nn.Module:
    """Return a random layer of the class `kind`, IN to OUT."""
    if kind is StreamedLinear:
        W, bias = torch.randn(OUT, IN).double(), nn.Parameter(torch.randn(OUT).double())
        return StreamedLinear(IN, OUT, dtype=torch.float64, source=lambda: W, bias=bias)
    if issubclass(kind, CodedLinear):
        coded: Any = kind
        return filled(coded(IN, OUT, dtype=torch.float64, bias=nn.Parameter(torch.randn(OUT).double())))
    layer = kind(OUT, IN) if issubclass(kind, Conv1D) else kind(IN, OUT)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.double().requires_grad_(False)


def started(adapter: LoRA, base: Any, config: LoraConfig) -> LoRA:
    """Return the adapter as `Adapted.add` leaves it."""
    adapter.init(base, config, torch.Generator().manual_seed(3))
    return adapter


@torch.no_grad()
def moved(adapter: LoRA) -> LoRA:
    """Return the adapter with every parameter that trains moved at random."""
    for kind, part in adapter.slots().items():
        if not kind.startswith("lora_start"):
            for p in part.parameters() if isinstance(part, nn.Module) else [part]:
                p.add_(torch.randn_like(p))
    return adapter


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("layer", FORMATS)
def test_linear_layers(kind: str, layer: type[nn.Module]) -> None:
    base: Any = FORMATS[layer](layer_of(layer))
    config = LoraConfig(r=4, lora_alpha=6, **CONFIGS[kind])
    adapter = started(ADAPTERS[kind](base, config, rank=4, alpha=6, dtype=torch.float64), base, config)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    y = base.matmul(x)

    # Identity at the start. DoRA: m = ||W|| exactly, so its gain is 1; PiSSA: the start is subtracted from itself.
    torch.testing.assert_close(adapter.delta(x, y, base), torch.zeros_like(y), rtol=0, atol=1e-13)
    assert adapter.delta_weight(base).shape == (OUT, IN)

    change = moved(adapter).delta(x, y, base)
    assert change.abs().max() > 1
    torch.testing.assert_close(change, x @ adapter.delta_weight(base).T, rtol=1e-10, atol=1e-10)
    factors = adapter.factors()
    if factors is None:
        assert kind == "dora"
    else:
        A, B, s = factors
        torch.testing.assert_close(adapter.delta_weight(base), s * B @ A, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", EMBEDDING_ADAPTERS)
def test_embeddings_are_linear_layers_of_one_hot_tokens(kind: str) -> None:
    table = nn.Embedding(IN, OUT).double().requires_grad_(False)
    base = EmbeddingBase(table)
    config = LoraConfig(r=4, lora_alpha=6, **CONFIGS[kind])
    adapter = started(EMBEDDING_ADAPTERS[kind](base, config, rank=4, alpha=6, dtype=torch.float64), base, config)
    assert isinstance(adapter, EmbeddingLoRA)
    ids = torch.arange(IN).reshape(3, 4)
    x = torch.eye(IN, dtype=torch.float64)[ids]
    torch.testing.assert_close(adapter.rows(ids, table(ids), base), torch.zeros(3, 4, OUT).double(), rtol=0, atol=1e-13)

    change = moved(adapter).rows(ids, table(ids), base)  # type: ignore[attr-defined]
    assert change.abs().max() > 1
    torch.testing.assert_close(change, adapter.delta(x, base.matmul(x), base), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(change, x @ adapter.delta_weight(base).T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_reach_the_factors_and_nothing_else(kind: str) -> None:
    """In the first step B has a gradient and A has none, since B is zero (LoRA's start); the base never has one."""
    base: Any = FORMATS[nn.Linear](layer_of(nn.Linear))
    config = LoraConfig(r=4, **CONFIGS[kind])
    adapter = started(ADAPTERS[kind](base, config, rank=4, alpha=8, dtype=torch.float64), base, config)
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    adapter.delta(x, base.matmul(x), base).sum().backward()
    assert base.weight.grad is None
    reached = {kind: _reached(part) for kind, part in adapter.slots().items() if list(_parameters(part))}
    starts_at_zero = kind != "residual"
    assert reached["lora_B"]
    assert reached["lora_A"] is not starts_at_zero
    assert reached.get("lora_magnitude_vector", True)
    assert not reached.get("lora_start_A", False)


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


def _reached(part: nn.Module | nn.Parameter) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in _parameters(part))


def test_dora_keeps_the_norm_a_constant() -> None:
    """Section 4.3 of the paper: B's gradient is g·s·dyᵀ(xAᵀ) with g held fixed; m's is sum dy·(W'x)/||W'||."""
    base: Any = FORMATS[nn.Linear](layer_of(nn.Linear))
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True)
    adapter: Any = moved(started(ADAPTERS["dora"](base, config, rank=4, alpha=6, dtype=torch.float64), base, config))
    x, dy = torch.randn(9, IN, dtype=torch.float64), torch.randn(9, OUT, dtype=torch.float64)
    (adapter.delta(x, base.matmul(x), base) * dy).sum().backward()
    W, A, B, m, s = base.weight, adapter.A.detach(), adapter.B.detach(), adapter.magnitude.weight.detach(), 6 / 4
    direction = W + s * B @ A
    norm = direction.norm(dim=1)
    expected_B: Tensor = s * (dy * (m / norm)).T @ (x @ A.T)
    expected_m: Tensor = (dy * (x @ direction.T) / norm).sum(0)
    torch.testing.assert_close(adapter.B.grad, expected_B, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.magnitude.weight.grad, expected_m, rtol=1e-10, atol=1e-10)
