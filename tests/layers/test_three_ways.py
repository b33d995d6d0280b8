"""The three ways of computing an adapted layer agree; small changes survive 16-bit arithmetic; misuse raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.api import get_peft_model
from decal.layers import adapted
from decal.layers.adapted import AdaptedLinear
from decal.layers.catalog import ADAPTERS, adapter_kind, base_of
from decal.layers.dense import WideLinear
from decal.layers.routing import Routing, Switch
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

IN, OUT = 64, 96


def one_layer(
    dtype: torch.dtype = torch.float64, *, fp32: bool = True, layer: nn.Module | None = None, **options: Any
) -> AdaptedLinear:
    """Return a linear layer with one adapter, active, its B random."""
    layer = (layer or nn.Linear(IN, OUT)).to(dtype).requires_grad_(False)
    base, switch = base_of(layer), Switch()
    assert base is not None
    config = LoraConfig(r=8, lora_alpha=16, **options)
    kept = torch.float32 if fp32 and dtype != torch.float64 else dtype
    adapter = ADAPTERS[adapter_kind(config)](base, config, rank=8, alpha=16, dtype=kept)
    adapter.init(base, config, torch.Generator().manual_seed(1))
    adapted_layer = AdaptedLinear(layer, base, switch)
    adapted_layer.add("a", adapter)
    switch.active = ("a",)
    with torch.no_grad():
        adapter.B.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return adapted_layer


def go_way(way: str, layer: AdaptedLinear, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the layer compute in one of the three ways."""
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 1 if way == "merged" else 10**9)
    layer.switch.routing = Routing.by_row(["a"] * rows) if way == "routed" else None


@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, OUT), lambda: Conv1D(OUT, IN)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_outputs_and_gradients_agree(make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = one_layer(layer=make(), **options)
    x0, dy = torch.randn(3, 50, IN, dtype=torch.float64), torch.randn(3, 50, OUT, dtype=torch.float64)
    results: dict[str, dict[str, Tensor]] = {}
    for way in ("side", "merged", "routed"):
        go_way(way, layer, 3, monkeypatch)
        x = x0.clone().requires_grad_()
        y = layer(x)
        layer.zero_grad()
        (y * dy).sum().backward()
        assert x.grad is not None
        grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        results[way] = {"y": y.detach(), "dx": x.grad, **grads}
    oracle.assert_same(results["merged"], results["side"], **oracle.FP64)
    oracle.assert_same(results["routed"], results["side"], **oracle.FP64)
    base: Any = layer.base
    expected = x0 @ (base.weight + layer.adapters["a"].delta_weight(base)).T + base.bias
    torch.testing.assert_close(results["side"]["y"], expected.detach(), **oracle.FP64)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(
    ("stored", "computed", "fp32_adapter"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),  # WideLinear: widened where it is used
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, True),
    ],
)
@pytest.mark.parametrize("way", ["side", "merged", "routed"])
def test_a_young_adapters_contribution_survives(
    way: str,
    stored: torch.dtype,
    computed: torch.dtype,
    fp32_adapter: bool,
    size: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Y - Y_base against fp64: gain 1 ± 0.02. Adding to a 16-bit y (as PEFT does) leaves 0.2 of it at |B| = 1e-4.

    The output's own 16-bit grid adds noise that does not depend on the change, so the gain is a regression over many
    tokens: its error is noise / (signal·sqrt(n)).
    """
    wide = WideLinear(IN, OUT) if stored != computed else None
    layer = one_layer(stored, fp32=fp32_adapter, layer=wide)
    adapter = layer.adapters["a"]
    with torch.no_grad():
        adapter.B.normal_(std=size, generator=torch.Generator().manual_seed(2))
    rows = 4000 if stored == computed and stored != torch.float32 else 200
    x = torch.randn(1, rows, IN, generator=torch.Generator().manual_seed(4)).to(computed)
    go_way(way, layer, 1, monkeypatch)
    with torch.no_grad():
        y = layer(x)
        with layer.switch.off():
            y_base = layer(x)
        exact = x.double() @ (adapter.A.double().T @ adapter.B.double().T) * adapter.scale
    contribution = y.double() - y_base.double()
    gain = float((contribution * exact).sum() / exact.pow(2).sum())
    assert y.dtype == computed
    assert abs(gain - 1) < 0.02


def test_bf16_base_with_fp32_adapters_keeps_the_masters_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = one_layer(torch.bfloat16)
    for way in ("side", "merged", "routed"):
        go_way(way, layer, 2, monkeypatch)
        layer(torch.randn(2, 9, IN, dtype=torch.bfloat16)).float().sum().backward()
        grads = {n: p.grad.dtype for n, p in layer.named_parameters() if p.grad is not None}
        assert set(grads.values()) == {torch.float32}, way
        assert layer(torch.randn(2, 9, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["side", "merged"])
def test_a_change_of_the_factors_between_forward_and_backward_raises(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = one_layer()
    go_way(way, layer, 2, monkeypatch)
    loss = layer(torch.randn(2, 9, IN, dtype=torch.float64, requires_grad=True)).sum()
    with torch.no_grad():
        layer.adapters["a"].B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_routed_gradients_are_of_the_factors_as_they_were_at_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Way 3 stacks copies of the factors: a later change raises nothing, because backward does not see it."""
    gradients = []
    for factor in (1, 2):
        layer = one_layer()
        go_way("routed", layer, 2, monkeypatch)
        loss = layer(torch.ones(2, 9, IN, dtype=torch.float64)).sum()
        with torch.no_grad():
            layer.adapters["a"].B.mul_(factor)
        loss.backward()
        gradients.append(layer.adapters["a"].A.grad)
    assert torch.equal(*gradients)


def test_double_backward_raises_where_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = one_layer()
    go_way("merged", layer, 2, monkeypatch)
    x = torch.randn(2, 9, IN, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_way_1_is_taken_for_many_rows_in_fp32_and_never_for_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, rows, expected in [
        (torch.float32, adapted.MERGE_ROWS["cpu"], True),
        (torch.float32, adapted.MERGE_ROWS["cpu"] - 1, False),
        (torch.bfloat16, 4 * adapted.MERGE_ROWS["cpu"], False),
    ]:
        layer = one_layer(dtype)
        taken: list[bool] = []
        monkeypatch.setattr(layer.base, "dense_plus", _noting(taken, layer.base.dense_plus))
        layer(torch.randn(rows, IN).to(dtype))
        assert bool(taken) is expected, (dtype, rows)


def _noting(taken: list[bool], original: Any) -> Any:
    def dense_plus(*args: Any) -> Tensor:
        taken.append(True)
        weight: Tensor = original(*args)
        return weight

    return dense_plus


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_whole_model_agrees_in_all_three_ways(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: PeftModel = get_peft_model(
        models.make(kind), LoraConfig(target_modules="all-linear", init_lora_weights=False, **options)
    )
    ids = models.tokens()
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 10**9)
    side = oracle.gradients(model, ids)
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 1)
    oracle.assert_same(oracle.gradients(model, ids), side, **oracle.FP64)
    oracle.assert_same(oracle.gradients(model, ids, adapter_names=["default"] * 3), side, **oracle.FP64)
