"""The configurations of plan.py: shapes of models, and what is trained of them on a CPU and on a card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LLAMA_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN3 = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
GEMMA2 = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "vocab_size": 32000,
}
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 2048, "vocab_size": 50257}
PHI = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
QWEN2_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
GEMMA_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
QWEN3_1B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2_L = {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 2048, "vocab_size": 50257}
PHI_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 51200,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    family: str
    shape: str
    method: str = "lora"
    rows: int = 4
    length: int = 512
    packed: bool = False
    dtype: str = "float32"
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = [f"{k}={v}" for k, v in {**self.train, **self.lora}.items()]
        kind = [self.shape, self.method, f"{self.rows}x{self.length}", self.dtype.replace("float", "fp")]
        return " ".join(kind + (["packed"] if self.packed else []) + extra)


CHECKPOINTED = {"gradient_checkpointing": True}
SHAPES = {name: value for name, value in list(globals().items()) if name.isupper() and isinstance(value, dict)}
CPU = [
    Case(family="Llama", shape="LLAMA_135M", rows=2, length=256),
    Case(family="Llama", shape="LLAMA_135M", rows=2, length=512, train=CHECKPOINTED),
    Case(family="Llama", shape="LLAMA_135M", rows=1, length=1024, dtype="bfloat16", packed=True),
    Case(family="Llama", shape="LLAMA_135M", rows=2, length=256, method="qlora"),
    Case(family="Llama", shape="LLAMA_135M", rows=1, length=128, method="full"),
    Case(family="Llama", shape="LLAMA_135M", rows=1, length=1024, lora={"target_modules": "attention", "r": 8}),
    Case(family="Qwen3", shape="QWEN3", rows=2, length=512),
    Case(family="Qwen3", shape="QWEN3", rows=2, length=256, method="qlora", train=CHECKPOINTED),
    Case(family="Qwen2", shape="QWEN3", rows=1, length=1024, lora={"lora_dropout": 0.1}),
    Case(family="Gemma2", shape="GEMMA2", rows=1, length=512),
    Case(family="GPT2", shape="GPT2", rows=2, length=256),
    Case(family="GPT2", shape="GPT2", rows=2, length=128, method="full", train={"optimizer": "adamw8bit"}),
    Case(family="Phi", shape="PHI", rows=1, length=512),
    Case(family="Llama", shape="QWEN3", rows=1, length=512, method="full", train=CHECKPOINTED),
]
CARD = [
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", rows=2, length=2048),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", rows=2, length=2048, packed=True),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", rows=2, length=4096, train=CHECKPOINTED),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", method="qlora", rows=2, length=2048),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", method="full", rows=2, length=1024),
    Case(
        family="Llama",
        shape="LLAMA_1B",
        dtype="bfloat16",
        method="full",
        rows=1,
        length=2048,
        train={**CHECKPOINTED, "optimizer": "adamw8bit"},
    ),
    Case(family="Qwen2", shape="QWEN2_3B", dtype="bfloat16", method="qlora", rows=1, length=4096),
    Case(family="Qwen2", shape="QWEN2_3B", dtype="bfloat16", rows=1, length=2048, train=CHECKPOINTED),
    Case(family="Qwen3", shape="QWEN3_1B", dtype="bfloat16", rows=4, length=1024, lora={"lora_dropout": 0.1}),
    Case(family="Qwen3", shape="QWEN3_1B", dtype="bfloat16", method="qlora", rows=4, length=512, train=CHECKPOINTED),
    Case(family="Gemma2", shape="GEMMA_2B", dtype="bfloat16", rows=1, length=1024),
    Case(family="GPT2", shape="GPT2_L", rows=4, length=512),
    Case(family="Phi", shape="PHI_1B", dtype="bfloat16", rows=4, length=512),
    Case(family="Llama", shape="LLAMA_135M", rows=4, length=512),
    Case(family="Llama", shape="LLAMA_135M", rows=16, length=512, lora={"target_modules": "attention", "r": 64}),
]
CASES = {"cpu": CPU, "cuda": CARD}
