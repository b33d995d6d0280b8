"""Every option of LoraConfig against PEFT: logits, gradients, merged weights, and the files read both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from decal.layers import adapted
from decal.model.wrapper import PeftModel
from tests import models, oracle

Options = dict[str, Any]
ATTENTION = ["q_proj", "v_proj"]
OPTIONS: dict[str, tuple[str, Options]] = {
    "defaults, targets left to the model": ("llama", {}),
    "r and lora_alpha": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ATTENTION}),
    "rslora": ("llama", {"r": 4, "use_rslora": True, "target_modules": ATTENTION}),
    "dora": ("llama", {"r": 4, "use_dora": True, "target_modules": ATTENTION}),
    "dora and rslora": ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ATTENTION}),
    "init gaussian": ("llama", {"init_lora_weights": "gaussian", "target_modules": ATTENTION}),
    "init False": ("llama", {"init_lora_weights": False, "target_modules": ATTENTION}),
    "dropout, not in training": ("llama", {"lora_dropout": 0.3, "target_modules": ATTENTION}),
    "suffix with a dot": ("llama", {"target_modules": ["self_attn.q_proj", "down_proj"]}),
    "full name": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "regex": ("llama", {"target_modules": r"model\.layers\.[01]\.mlp\.(up|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear, GPT-2": ("gpt2", {"target_modules": "all-linear"}),
    "exclude by suffix": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "0.mlp.up_proj"]}),
    "exclude by regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"}),
    "one layer": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    "list of layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [0]}),
    "layers_pattern": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers_pattern, GPT-2": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    ),
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 5, "up_proj": 3},
            "alpha_pattern": {"up_proj": 32, "^model.layers.0.self_attn.v_proj": 1},
        },
    ),
    "rank pattern with rslora and dora": (
        "llama",
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "use_rslora": True, "use_dora": True},
    ),
    "bias lora_only": ("llama-biased", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "bias all": ("llama-biased", {"target_modules": ATTENTION, "bias": "all"}),
    "bias all, GPT-2 (norms, too)": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias lora_only, Qwen2": ("qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "modules_to_save": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "modules_to_save, norm and embedding": (
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "token rows, list": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [5, 3, 40]}),
    "token rows, dict": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [4, 9]}}),
    "token rows and the model's own targets": ("llama", {"trainable_token_indices": [4, 9]}),
    "token rows, tied head": ("llama-tied", {"target_modules": ATTENTION, "trainable_token_indices": [4, 9]}),
    "token rows, Gemma": ("gemma", {"target_modules": ATTENTION, "trainable_token_indices": [4, 9]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "embedding init False": ("llama", {"target_modules": ["embed_tokens"], "init_lora_weights": False}),
    "output head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "tables and Conv1D of an untied GPT-2": ("gpt2-untied", {"target_modules": ["wte", "wpe", "c_proj"]}),
    "table and head of an untied GPT-2": ("gpt2-untied", {"target_modules": ["wte", "lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D with dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "GPT-2's own targets": ("gpt2", {}),
    "Qwen2, biases": ("qwen2", {"target_modules": "all-linear"}),
    "Qwen2, biases with dora": ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
    "Mistral": ("mistral", {"target_modules": "all-linear", "use_rslora": True}),
    "Gemma": ("gemma", {"target_modules": "all-linear"}),
    "Gemma 2": ("gemma2", {}),
    "task CAUSAL_LM": ("llama", {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
    "task SEQ_CLS": ("classifier", {"task_type": "SEQ_CLS", "target_modules": ATTENTION}),
    "task SEQ_CLS, all-linear": ("classifier", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
}
every_option = pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)


@every_option
@pytest.mark.parametrize("way", ["side", "merged on the fly"])
def test_logits_and_gradients_equal_pefts(
    kind: str, options: Options, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 1 if way == "merged on the fly" else 10**9
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", rows)
    ours, theirs = oracle.pair(kind, **options)
    ids = models.tokens()
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), **oracle.FP64)
    oracle.assert_same(oracle.gradients(ours, ids), oracle.gradients(theirs, ids), **oracle.FP64)


@every_option
def test_merged_weights_equal_pefts(kind: str, options: Options) -> None:
    ours, theirs = oracle.pair(kind, **options)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    oracle.assert_same(merged.state_dict(), expected.state_dict(), **oracle.FP64)


@every_option
def test_files_are_equal_and_each_reads_the_others(kind: str, options: Options, tmp_path: Path) -> None:
    ours, theirs = oracle.pair(kind, **options)
    ids = models.tokens()
    expected = oracle.logits(theirs, ids)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    oracle.assert_same(saved, load_file(tmp_path / "theirs" / "adapter_model.safetensors"), rtol=0, atol=0)
    mine, other = oracle.settings(tmp_path / "ours"), oracle.settings(tmp_path / "theirs")
    if options.get("target_modules") == "all-linear":
        mine.pop("target_modules")  # PEFT writes every layer's full name, decal the last names where these suffice
    assert {key: other[key] for key in mine} == mine

    by_peft = peft.PeftModel.from_pretrained(models.make(kind), tmp_path / "ours")
    by_decal = PeftModel.from_pretrained(models.make(kind), tmp_path / "theirs")
    torch.testing.assert_close(oracle.logits(by_peft, ids), expected, **oracle.FP64)
    torch.testing.assert_close(oracle.logits(by_decal, ids), expected, **oracle.FP64)
