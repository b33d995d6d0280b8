"""Tiny transformers models from a configuration: one of each kind of layer that decal adapts, made in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough for a wrong layer to be seen in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _causal("Llama", tie_word_embeddings=False),
    "llama-tied": lambda: _causal("Llama", tie_word_embeddings=True),
    "llama-biased": lambda: _causal("Llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: _causal("Qwen2", tie_word_embeddings=False),
    "qwen3": lambda: _causal("Qwen3", head_dim=8, tie_word_embeddings=False),
    "mistral": lambda: _causal("Mistral", tie_word_embeddings=False),
    "gemma": lambda: _causal("Gemma", head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: _causal("Gemma2", head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        )
    ),
    "phi3": lambda: _causal("Phi3", tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SIZES)),
    "gpt2-untied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2_SIZES, tie_word_embeddings=False)
    ),
    "classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES, num_labels=3, tie_word_embeddings=False)
    ),
    "mixtral": lambda: _causal("Mixtral", num_local_experts=4, tie_word_embeddings=False),
}


def _causal(kind: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def make(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Return a tiny model of `kind`; in fp64 its norms are fp64, too, so that 1e-10 can be asked of the whole model."""
    torch.manual_seed(seed)
    model = MAKERS[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, where a lost bias would not be seen
            nn.init.normal_(parameter, std=0.2)
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        _exact_norms(model)
    return model


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input (transformers' own computes in fp32 whatever the model)."""

    def __init__(self, weight: nn.Parameter, offset: float, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.offset = offset
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return x * norm * (self.offset + self.weight)


def _exact_norms(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            gemma = type(module).__name__.startswith("Gemma")
            epsilon: Any = module.eps if gemma else module.variance_epsilon
            parent, _, child = name.rpartition(".")
            exact = ExactNorm(module.weight, 1.0 if gemma else 0.0, epsilon)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), child, exact)


def twins(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Any, Any]:
    """Return two equal models that share nothing."""
    model = make(kind, dtype, seed)
    return model, copy.deepcopy(model)


def tokens(rows: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    """Return token ids (rows, length) without padding or end of text."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
