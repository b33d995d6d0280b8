"""PEFT's choice of target modules where a configuration names none, by `config.model_type`.

A test compares this table with PEFT's own, entry by entry, for the causal and classification models decal adapts.
"""

from __future__ import annotations

_BY_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3"
    ),
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
}
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    kind: targets for targets, kinds in _BY_TARGETS.items() for kind in kinds.split()
}
