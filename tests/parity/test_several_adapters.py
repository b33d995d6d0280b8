"""Several adapters on one model: switching, summing, deleting, disabling and merging, against PEFT and formulas."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from decal.errors import Unsupported
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

A: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
B: dict[str, Any] = {"r": 2, "lora_alpha": 16, "target_modules": ["v_proj", "up_proj"], "use_rslora": True}
DORA: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_dora": True}
SAVED: dict[str, Any] = {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}


def two(first: dict[str, Any], second: dict[str, Any], kind: str = "llama") -> oracle.Pair:
    """Return the pair with adapters "default" and "b", both random."""
    ours, theirs = oracle.pair(kind, **first)
    ours.add_adapter("b", LoraConfig(**second))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter("b", peft.LoraConfig(**second))
    for model in (ours, theirs):
        model.set_adapter("b")
    oracle.copy_weights(ours, theirs, randomize=0.1)
    return oracle.Pair(ours.eval(), theirs.eval())


@pytest.mark.parametrize("second", [B, SAVED, DORA], ids=["other targets", "modules_to_save", "dora"])
def test_switching_gives_each_adapter_alone(second: dict[str, Any]) -> None:
    ours, theirs = two(A, second)
    ids = models.tokens()
    for name in ("default", "b", "default"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert ours.active_adapters == [name] == theirs.active_adapters
        torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), **oracle.FP64)
        oracle.assert_same(oracle.gradients(ours, ids), oracle.gradients(theirs, ids), **oracle.FP64)


def test_the_sum_of_two_adapters_equals_pefts() -> None:
    ours, theirs = two(A, B)
    ids = models.tokens()
    ours.set_adapter(["default", "b"])
    theirs.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), **oracle.FP64)
    oracle.assert_same(oracle.gradients(ours, ids), oracle.gradients(theirs, ids), **oracle.FP64)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    oracle.assert_same(merged.state_dict(), expected.state_dict(), **oracle.FP64)


def test_a_dora_among_several_adds_what_it_adds_alone() -> None:
    """W + ΔW_a + ΔW_dora, in either order. PEFT reads the running sum in DoRA: its result depends on the order."""
    ours, theirs = two(A, DORA)
    layer = ours.get_base_model().model.layers[0].self_attn.v_proj
    other = theirs.get_base_model().model.layers[0].self_attn.v_proj
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    W = layer.weight.detach()
    alone = {name: layer.get_delta_weight(name).detach() for name in ("default", "b")}
    expected = x @ (W + alone["default"] + alone["b"]).T
    results = []
    for order in (["default", "b"], ["b", "default"]):
        ours.set_adapter(order)
        torch.testing.assert_close(layer(x), expected, **oracle.FP64)
        theirs.base_model.set_adapter(order)
        results.append(other(x))
    assert not torch.allclose(results[0], results[1], rtol=1e-3)
    torch.testing.assert_close(results[1], expected, **oracle.FP64)  # the DoRA first: PEFT's and decal's agree
    ours.merge_adapter()
    torch.testing.assert_close(layer(x), expected, **oracle.FP64)


def test_only_active_adapters_train() -> None:
    ours, theirs = two(A, SAVED)
    for names in ("default", "b"):
        ours.set_adapter(names)
        theirs.set_adapter(names)
        assert oracle.trained(ours).keys() == oracle.trained(theirs).keys()
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.set_adapter("b", inference_mode=True)
    assert not oracle.trained(ours)


def test_disabled_is_the_base() -> None:
    ours, _ = two(A, SAVED)
    ids = models.tokens()
    base = oracle.logits(models.make("llama"), ids)
    with ours.disable_adapter():
        assert torch.equal(oracle.logits(ours, ids), base)
        with ours.disable_adapter():
            assert torch.equal(oracle.logits(ours, ids), base)
        assert torch.equal(oracle.logits(ours, ids), base)
    assert not torch.allclose(oracle.logits(ours, ids), base)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_each_adapter_has_its_own_biases(bias: str, tmp_path: Path) -> None:
    """PEFT refuses a second adapter with biases; decal keeps one copy each. PEFT's single ones are the oracle."""
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": bias}
    ids = models.tokens()
    expected = {}
    for size, name in ((0.1, "one"), (0.3, "two")):
        _, theirs = oracle.pair("llama-biased", size=size, **options)
        expected[name] = oracle.logits(theirs, ids)
        theirs.save_pretrained(tmp_path / name)
    ours = PeftModel.from_pretrained(models.make("llama-biased"), tmp_path / "one", adapter_name="one")
    ours.load_adapter(tmp_path / "two", adapter_name="two")
    base = oracle.logits(models.make("llama-biased"), ids)
    for name in ("one", "two", "one"):
        ours.set_adapter(name)
        torch.testing.assert_close(oracle.logits(ours, ids), expected[name], **oracle.FP64)
        with ours.disable_adapter():
            assert torch.equal(oracle.logits(ours, ids), base)
    with pytest.raises(Unsupported, match="biases"):
        ours.set_adapter(["one", "two"])
    with pytest.raises(Unsupported, match="biases"):
        oracle.logits(ours, ids, adapter_names=["one", "two", "__base__"])
    ours.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(models.make("llama-biased"), tmp_path / "again" / "two")
    torch.testing.assert_close(oracle.logits(again, ids), expected["two"], **oracle.FP64)
    merged = ours.merge_and_unload(adapter_names=["two"])  # not the active one
    torch.testing.assert_close(oracle.logits(merged, ids), expected["two"], **oracle.FP64)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_unload_takes_trained_biases_out(bias: str) -> None:
    ours, _ = oracle.pair("llama-biased", target_modules=["q_proj"], bias=bias)
    ids = models.tokens()
    assert torch.equal(oracle.logits(ours.unload(), ids), oracle.logits(models.make("llama-biased"), ids))


def test_merging_one_that_is_not_active_takes_its_modules_too() -> None:
    ours, _ = two(A, SAVED)
    ids = models.tokens()
    ours.set_adapter("b")
    expected = oracle.logits(ours, ids)
    ours.set_adapter("default")
    ours.merge_adapter(["b"])
    torch.testing.assert_close(oracle.logits(ours, ids), expected, **oracle.FP64)
    torch.testing.assert_close(oracle.logits(ours.merge_and_unload(), ids), expected, **oracle.FP64)


def test_deleting_an_adapter_leaves_no_trace() -> None:
    ours, theirs = two(A, SAVED)
    for model in (ours, theirs):
        model.set_adapter("default")
        model.delete_adapter("b")
    assert list(ours.peft_config) == ["default"]
    ids = models.tokens()
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), **oracle.FP64)
    assert not [name for name in ours.state_dict() if ".b." in name]
    ours.add_adapter("b", LoraConfig(**B))
    ours.delete_adapter("default")
    assert ours.active_adapters == ["b"]
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(models.make("llama"), ids), **oracle.FP64)


def test_files_of_several_adapters_lie_where_peft_puts_them(tmp_path: Path) -> None:
    ours, theirs = two(A, SAVED)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ids = models.tokens()
    for folder in ("", "b"):
        files = {p.name for p in (tmp_path / "ours" / folder).iterdir()} - {"decal.json"}
        assert files <= {p.name for p in (tmp_path / "theirs" / folder).iterdir()}
        by_decal = PeftModel.from_pretrained(models.make("llama"), tmp_path / "theirs" / folder)
        by_peft = peft.PeftModel.from_pretrained(models.make("llama"), tmp_path / "ours" / folder)
        torch.testing.assert_close(oracle.logits(by_decal, ids), oracle.logits(by_peft, ids), **oracle.FP64)
    ours.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["b"]
