"""Models of a few layers as folders with a config.json alone, or with random weights, and what is planned of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from decal.planning.wanted import Wanted
from decal.spec import LoraConfig, QuantConfig, TrainConfig

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 512,
    "vocab_size": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2", {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "phi": ("Phi", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "gpt2": ("GPT2", GPT2),
}
SIZES = {  # published shapes
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}


def config_of(family: str) -> Any:
    """Return the transformers configuration of a tiny model."""
    name, sizes = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**sizes, dtype=torch.float32)


def save_config(folder: Path, family: str, *, dtype: str | None = None) -> Path:
    """Write a tiny model's configuration; there are no weights."""
    config = config_of(family)
    config.dtype = dtype or config.dtype
    config.architectures = [type(transformers.AutoModelForCausalLM._model_mapping[type(config)]).__name__]
    config.save_pretrained(folder)
    return folder


def save_size(folder: Path, size: str) -> Path:
    """Write the configuration of a large Llama in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**facts, "tie_word_embeddings": False, **SIZES[size]}))
    return folder


def wanted(
    model: Path,
    *,
    length: int = 96,
    quantize: str | None = None,
    head: str = "wide",
    packed: bool = False,
    device: Any = "cpu",
    numbers: Any = "fp32",
    lora: dict[str, Any] | None = None,
    **train: Any,
) -> Wanted:
    """Return a small run of a model: two rows, LoRA of rank 4 on all linear layers."""
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **(lora or {})}
    return Wanted(
        model=str(model),
        lora=LoraConfig(**adapter),
        train=TrainConfig(**{"micro_batch": 2, **train}),
        quantize=None if quantize is None else QuantConfig(format=quantize, head=head),  # type: ignore[arg-type]
        length=length,
        packed=packed,
        device=device,
        numbers=numbers,
    )
