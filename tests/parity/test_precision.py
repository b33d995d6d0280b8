"""fp32 and 16-bit models against PEFT, on every architecture, with transformers' own norms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from decal.api import get_peft_model
from decal.layers import adapted
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

KINDS = ["llama", "qwen2", "mistral", "gemma", "gemma2", "gpt2"]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("way", ["side", "merged on the fly"])
def test_fp32_logits_and_merged_weights(
    kind: str, options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 1 if way == "merged on the fly" else 10**9)
    pair = oracle.pair(kind, dtype=torch.float32, size=0.02, target_modules="all-linear", **options)
    ids = models.tokens()
    # Logits of size 1 to 10 over sums of 32 to 48 products: fp32 rounding, in another order
    expected = oracle.logits(pair.theirs, ids)
    torch.testing.assert_close(oracle.logits(pair.ours, ids), expected, rtol=0, atol=2e-5)
    merged = pair.ours.merge_and_unload()
    torch.testing.assert_close(oracle.logits(merged, ids), expected, rtol=0, atol=5e-5)
    theirs = pair.theirs.merge_and_unload().state_dict()
    oracle.assert_same(merged.state_dict(), theirs, rtol=0, atol=2e-7)


def test_the_attention_of_a_mixture_of_experts() -> None:
    """PEFT's all-linear reaches Mixtral's experts and router as parameters, decal's does not (it says so)."""
    ours, theirs = oracle.pair("mixtral", dtype=torch.float32, size=0.02, target_modules=["q_proj", "k_proj", "o_proj"])
    ids = models.tokens()
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_16_bit_bases_get_fp32_adapters_and_16_bit_logits(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = oracle.pair(kind, dtype=dtype, size=0.02, target_modules="all-linear")
    assert {p.dtype for p in oracle.trained(ours).values()} == {torch.float32}
    ids = models.tokens()
    exact = copy.deepcopy(ours).double()
    got, expected = oracle.logits(ours, ids), oracle.logits(theirs, ids)
    assert got.dtype == dtype
    truth = oracle.logits(exact, ids)
    error = (got.double() - truth).norm() / truth.norm()
    pefts = (expected.double() - truth).norm() / truth.norm()
    assert error < 1.5 * pefts  # the same arithmetic but for one rounding fewer a layer
    grads = oracle.gradients(ours, ids)
    assert {g.dtype for g in grads.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_adapters_of_the_bases_dtype_on_request(dtype: torch.dtype) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(models.make("llama", dtype), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in oracle.trained(model).values()} == {dtype}
    assert oracle.logits(model, models.tokens()).dtype == dtype


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_merging_into_16_bits_rounds_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """W + ΔW in fp32, then one rounding; PEFT rounds ΔW, too. Unmerging restores the very bits."""
    ours, _ = oracle.pair("llama", dtype=dtype, size=0.02, target_modules="all-linear")
    layer = ours.get_base_model().model.layers[0].mlp.up_proj
    W = layer.weight.clone()
    change = layer.get_delta_weight("default")
    assert change.dtype == torch.float32
    bits = {name: p.clone() for name, p in ours.named_parameters()}
    ours.merge_adapter()
    assert torch.equal(layer.weight, (W.float() + change).to(dtype))
    ours.unmerge_adapter()
    assert all(torch.equal(p, bits[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("convert", ["to", "half", "bfloat16"])
def test_the_whole_model_follows_a_conversion(convert: str) -> None:
    ours, _ = oracle.pair("llama", dtype=torch.float32, target_modules=["q_proj", "embed_tokens"])
    dtype = {"to": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}[convert]
    converted = ours.to(dtype) if convert == "to" else getattr(ours, convert)()
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert oracle.logits(converted, models.tokens()).dtype == dtype
    assert oracle.gradients(converted, models.tokens())


def test_autocast_computes_in_16_bits_with_fp32_masters() -> None:
    ours, theirs = oracle.pair("llama", dtype=torch.float32, size=0.02, target_modules="all-linear")
    ids = models.tokens()
    results = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append((oracle.logits(model, ids).float(), oracle.gradients(model, ids)))
    (got, grads), (expected, _) = results
    truth = oracle.logits(copy.deepcopy(ours).double(), ids)
    assert (got - truth).norm() < 1.5 * (expected - truth).norm()
    assert {g.dtype for g in grads.values()} == {torch.float32}


def _gradients(model: Any, ids: torch.Tensor, *, autocast: bool) -> dict[str, torch.Tensor]:
    """As in training: forward under autocast, backward outside of it, where nothing is cast."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", [1, 10**9], ids=["merged", "side branch"])
def test_autocast_over_an_fp32_base_gives_the_gradients_of_fp32(way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", way)
    ours, _ = oracle.pair("llama", dtype=torch.float32, size=0.02, target_modules="all-linear")
    ids = models.tokens()
    exact, rounded = (_gradients(ours, ids, autocast=autocast) for autocast in (False, True))
    assert rounded.keys() == exact.keys()
    for name, gradient in exact.items():  # bf16 keeps 8 bits: some tens of roundings of 2^-9 on the way
        assert (rounded[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_a_padding_row_learns_nothing(tmp_path: Path) -> None:
    """nn.Embedding(padding_idx=...) gives its row no gradient; nor does an adapter on it, as in PEFT."""
    ours, theirs = oracle.pair("llama", target_modules=["embed_tokens"])
    ids = models.tokens()
    ids[:, :3] = 0
    assert ours.get_base_model().model.embed_tokens.padding_idx == 0
    oracle.assert_same(oracle.gradients(ours, ids), oracle.gradients(theirs, ids), **oracle.FP64)
    rows, their_rows = oracle.pair("llama", target_modules=["q_proj"], trainable_token_indices=[0, 5])
    oracle.assert_same(oracle.gradients(rows, ids), oracle.gradients(their_rows, ids), **oracle.FP64)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_of_a_16_bit_base_is_fp32_and_comes_back(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    ours, _ = oracle.pair("llama", dtype=torch.bfloat16, target_modules=["q_proj", "v_proj"])
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        models.make("llama", torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    oracle.assert_same(dict(oracle.trained(again)), dict(oracle.trained(ours)), rtol=0, atol=0)
