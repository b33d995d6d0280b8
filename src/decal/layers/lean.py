"""Gated MLPs and RMS norms that keep less for backward: their outputs are made again where a gradient needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from decal.ops import remake

# Classes of transformers that compute exactly what the lean forms do.
NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP"}
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


class LeanGatedMLP(nn.Module):
    """down(act(gate(x)) ∘ up(x)) that keeps gate and up alone; the parts are the original's own modules."""

    def __init__(self, mlp: Any, activation: str) -> None:
        super().__init__()
        self.gate_proj: nn.Module = mlp.gate_proj
        self.up_proj: nn.Module = mlp.up_proj
        self.down_proj: nn.Module = mlp.down_proj
        self.act_fn = mlp.act_fn
        self._original: tuple[nn.Module] = (mlp,)  # in a tuple: not a part of this module
        self._product = remake.GatedProduct(activation)

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.down_proj(remake.made(self._product, self.gate_proj(x), self.up_proj(x)))
        return out


class LeanRMSNorm(nn.Module):
    """An RMS norm with a frozen weight that keeps its input alone."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self._original: tuple[nn.Module] = (norm,)
        self.eps = float(_eps(norm))
        self._norm = remake.RMSNorm(self.eps)

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return remake.made(self._norm, x, self.weight)


def _eps(norm: Any) -> float:
    eps: float = norm.variance_epsilon
    return eps


def lean_of(module: nn.Module) -> LeanGatedMLP | LeanRMSNorm | None:
    """Return the lean form of a module of a known class whose own forward computes just this, else None."""
    kind = type(module).__name__
    if not type(module).__module__.startswith("transformers.models."):
        return None
    if kind in NORMS and not module.weight.requires_grad:
        return LeanRMSNorm(module)
    if kind in MLPS:
        activation = activation_of(module)
        if activation in ACTIVATIONS:
            return LeanGatedMLP(module, activation)
    return None


def activation_of(mlp: Any) -> str:
    """Return the name of an MLP's activation."""
    config = mlp.config
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
