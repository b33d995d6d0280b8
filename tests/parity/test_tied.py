"""Tied embeddings and heads: one change acts on both sides, and survives merging, saving and reloading."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from decal.api import get_peft_model
from decal.errors import TargetError
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

TIED_KINDS = ["llama-tied", "gemma", "gpt2"]
EMBEDDING = {"llama-tied": "embed_tokens", "gemma": "embed_tokens", "gpt2": "wte"}


def tied(kind: str, **options: Any) -> PeftModel:
    """Return a tied model with a random adapter on the pair."""
    config = LoraConfig(target_modules=[EMBEDDING[kind]], ensure_weight_tying=True, **options)
    model = get_peft_model(models.make(kind), config)
    with torch.no_grad():
        for p in oracle.trained(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype), alpha=0.1)
    return model.eval()


def written_out(kind: str, model: PeftModel) -> Any:
    """Return the plain model whose one table has the change added: what the adapted pair must equal."""
    plain = models.make(kind)
    table = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        plain.get_input_embeddings().weight += table.get_delta_weight("default")
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    return plain


@pytest.mark.parametrize("kind", TIED_KINDS)
@pytest.mark.parametrize("name", ["the embedding", "the head", "both"])
def test_the_flag_adapts_both_sides(kind: str, name: str) -> None:
    targets = {"the embedding": [EMBEDDING[kind]], "the head": ["lm_head"], "both": [EMBEDDING[kind], "lm_head"]}
    model = get_peft_model(models.make(kind), LoraConfig(target_modules=targets[name], ensure_weight_tying=True))
    with torch.no_grad():
        for p in oracle.trained(model).values():
            p.normal_(std=0.1)
    ids = models.tokens()
    plain = written_out(kind, model)
    torch.testing.assert_close(oracle.logits(model, ids), oracle.logits(plain, ids), **oracle.FP64)
    assert len(oracle.trained(model)) == 2


@pytest.mark.parametrize("kind", TIED_KINDS)
def test_gradients_are_those_of_the_one_table(kind: str) -> None:
    """dL/dA = s·Bᵀ·G and dL/dB = s·G·Aᵀ, where G (D, V) is the gradient of the table, from both of its uses."""
    model = tied(kind, r=4)
    ids = models.tokens()
    got = oracle.gradients(model, ids)
    plain = written_out(kind, model)
    plain.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    (G,) = oracle.gradients(plain, ids).values()
    adapter = model.get_base_model().get_input_embeddings().adapters["default"]
    A, B, s = adapter.A.detach(), adapter.B.detach(), adapter.scale
    by_kind = {name.split(".")[-2]: grad for name, grad in got.items()}
    torch.testing.assert_close(by_kind["lora_embedding_A"], s * B.T @ G.T, **oracle.FP64)
    torch.testing.assert_close(by_kind["lora_embedding_B"], s * G.T @ A.T, **oracle.FP64)


@pytest.mark.parametrize("kind", TIED_KINDS)
def test_merging_adds_the_change_once_and_unmerging_takes_it_out(kind: str) -> None:
    model = tied(kind)
    ids = models.tokens()
    before, bits = oracle.logits(model, ids), model.get_base_model().get_input_embeddings().weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(oracle.logits(model, ids), before, **oracle.FP64)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().get_input_embeddings().weight, bits)
    assert torch.equal(oracle.logits(model, ids), before)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_merged_model_reloads_tied(kind: str, tmp_path: Path) -> None:
    model = tied(kind)
    ids = models.tokens()
    expected = oracle.logits(model, ids)
    merged: Any = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    if kind == "gpt2":  # its norms compute in fp64
        torch.testing.assert_close(oracle.logits(again, ids), expected, **oracle.FP64)
    else:  # the reloaded model has transformers' own norms, which are fp32 inside
        torch.testing.assert_close(oracle.logits(again, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "gemma"])  # PEFT 0.21.2 leaves GPT-2's head out, and reloads less still
def test_peft_reads_ours_and_we_read_pefts(kind: str, tmp_path: Path) -> None:
    model = tied(kind)
    ids = models.tokens()
    expected = oracle.logits(model, ids)
    model.save_pretrained(tmp_path / "ours")
    by_decal = PeftModel.from_pretrained(models.make(kind), tmp_path / "ours")
    torch.testing.assert_close(oracle.logits(by_decal, ids), expected, **oracle.FP64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied layers, and on the head's factors that it shares
        by_peft = peft.PeftModel.from_pretrained(models.make(kind), tmp_path / "ours")
        torch.testing.assert_close(oracle.logits(by_peft, ids), expected, **oracle.FP64)
        by_peft.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(models.make(kind), tmp_path / "theirs")
    torch.testing.assert_close(oracle.logits(again, ids), expected, **oracle.FP64)


def test_a_tied_gpt2_reloads(tmp_path: Path) -> None:
    model = tied("gpt2")
    model.save_pretrained(tmp_path)
    ids = models.tokens()
    again = PeftModel.from_pretrained(models.make("gpt2"), tmp_path)
    torch.testing.assert_close(oracle.logits(again, ids), oracle.logits(model, ids), **oracle.FP64)


def test_pefts_merge_of_a_tied_pair_counts_the_change_twice() -> None:
    """Why PEFT is not the oracle of the merge here: its merged model is not its own adapted one. Ours is."""
    theirs = oracle.theirs_of(models.make("llama-tied"), {"target_modules": ["lm_head"], "ensure_weight_tying": True})
    with torch.no_grad():
        for p in oracle.trained(theirs).values():
            p.normal_(std=0.1)
    ids = models.tokens()
    before = oracle.logits(theirs.eval(), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "this can lead to complications"
        merged = theirs.merge_and_unload()
    assert not torch.allclose(oracle.logits(merged, ids), before, atol=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_and_gradients_equal_pefts(dropout: float) -> None:
    """With dropout, too: PEFT drops the head's input and not the embedding's.

    PEFT has the same memory under two parameters, one of each side; the gradient of ours is the sum of both.
    """
    settings: dict[str, Any] = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    settings["lora_dropout"] = dropout
    theirs = oracle.theirs_of(models.make("llama-tied"), settings)
    ours = get_peft_model(models.make("llama-tied"), LoraConfig(**settings))
    mine, other = oracle.trained(ours), oracle.trained(theirs)
    assert mine.keys() < other.keys()
    with torch.no_grad():
        for name, p in mine.items():
            other[name].normal_(std=0.1)
            p.copy_(other[name])
    torch.manual_seed(4)
    got = oracle.gradients(ours.train(), models.tokens())
    torch.manual_seed(4)
    expected = oracle.gradients(theirs.train(), models.tokens())
    for kind, head_kind in (("lora_embedding_A", "lora_B"), ("lora_embedding_B", "lora_A")):
        here = f"base_model.model.model.embed_tokens.{kind}.default"
        head = expected[f"base_model.model.lm_head.{head_kind}.default.weight"]
        torch.testing.assert_close(got[here], expected[here] + head.T, **oracle.FP64)


@pytest.mark.parametrize("kind", TIED_KINDS)
def test_without_the_flag_it_is_refused_with_the_way_out(kind: str) -> None:
    plain = models.make(kind)
    ids = models.tokens()
    before = oracle.logits(plain, ids)
    for options in ({"target_modules": ["lm_head"]}, {"target_modules": [EMBEDDING[kind]]}):
        with pytest.raises(TargetError, match="ensure_weight_tying=True"):
            get_peft_model(plain, LoraConfig(**options))
    inner = "c_attn" if kind == "gpt2" else "q_proj"
    with pytest.raises(TargetError, match="ensure_weight_tying=True"):
        get_peft_model(plain, LoraConfig(target_modules=[inner], modules_to_save=["lm_head"]))
    assert torch.equal(oracle.logits(plain, ids), before)
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("named", ["the embedding", "the head"])
def test_modules_to_save_of_a_tied_pair_is_one_module(kind: str, named: str, tmp_path: Path) -> None:
    name = EMBEDDING[kind] if named == "the embedding" else "lm_head"
    inner = "c_attn" if kind == "gpt2" else "q_proj"
    config = LoraConfig(target_modules=[inner], modules_to_save=[name], ensure_weight_tying=True)
    model = get_peft_model(models.make(kind), config)
    tables = [p for n, p in oracle.trained(model).items() if "modules_to_save" in n]
    assert len(tables) == 1
    with torch.no_grad():
        tables[0].add_(0.1 * torch.randn_like(tables[0]))
    plain = models.make(kind)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(tables[0])
    ids = models.tokens()
    expected = oracle.logits(plain, ids)
    torch.testing.assert_close(oracle.logits(model, ids), expected, **oracle.FP64)
    model.save_pretrained(tmp_path / "ours")
    by_decal = PeftModel.from_pretrained(models.make(kind), tmp_path / "ours")
    torch.testing.assert_close(oracle.logits(by_decal, ids), expected, **oracle.FP64)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(oracle.logits(merged, ids), expected, **oracle.FP64)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings
    if (kind, named) == ("gpt2", "the embedding"):  # PEFT 0.21.2 ties GPT-2's head only when the head is named
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_peft = peft.PeftModel.from_pretrained(models.make(kind), tmp_path / "ours")
        torch.testing.assert_close(oracle.logits(by_peft, ids), expected, **oracle.FP64)
        by_peft.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(models.make(kind), tmp_path / "theirs")
    torch.testing.assert_close(oracle.logits(again, ids), expected, **oracle.FP64)


def test_a_pair_that_the_user_untied_merges_into_a_head_of_its_own(tmp_path: Path) -> None:
    """config.tie_word_embeddings=False and a copy of the weight: head and embedding are two layers from then on."""
    plain = models.make("gpt2")
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.config.tie_word_embeddings = False
    model = get_peft_model(plain, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    ids = models.tokens()
    expected = oracle.logits(model, ids)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(oracle.logits(merged, ids), expected, **oracle.FP64)
    merged.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(oracle.logits(again, ids), expected, **oracle.FP64)


def test_pefts_own_file_with_both_sides_is_read(tmp_path: Path) -> None:
    """PEFT's tied pair: we give its logits from its file."""
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "r": 4}
    theirs = oracle.theirs_of(models.make("llama-tied"), options)
    with torch.no_grad():
        for p in oracle.trained(theirs).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype), alpha=0.1)
    ids = models.tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.eval().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(models.make("llama-tied"), tmp_path)
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), **oracle.FP64)


@pytest.mark.parametrize("kind", TIED_KINDS)
def test_a_tied_adapter_in_a_mixed_batch(kind: str) -> None:
    model = tied(kind)
    ids = models.tokens()
    mixed = oracle.logits(model, ids, adapter_names=["default", "__base__", "default"])
    expected = oracle.logits(model, ids)
    with model.disable_adapter():
        base = oracle.logits(model, ids)
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], **oracle.FP64)
    torch.testing.assert_close(mixed[1], base[1], **oracle.FP64)
