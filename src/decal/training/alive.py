"""Whether the first backward pass reached what is meant to be trained."""

from __future__ import annotations

import torch
from torch import nn

from decal.errors import RunError

# One factor of a fresh adapter is zero, so the other one's first gradient is zero, too: that is how LoRA begins.
PARTNERS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def without_gradient(model: nn.Module) -> list[str]:
    """Return the trainable parameters whose gradient is missing or zero and should not be. Waits for the device.

    Raises RunError if no trainable parameter at all has a gradient.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached = [(name, p.grad) for name, p in named.items() if p.grad is not None]
    sizes: list[float] = []
    if reached:
        sizes = torch.stack([norm.float() for norm in torch._foreach_norm([g for _, g in reached])]).tolist()
    alive = {name for (name, _), size in zip(reached, sizes, strict=True) if size != 0}  # NaN is not 0: alive
    if not alive:
        raise RunError(
            f"none of the {len(named)} trainable parameters got a gradient on the first step: nothing would be learnt",
            got=", ".join(list(named)[:3]),
            fix="Check that the targets lie in the part of the model that the loss depends on.",
        )
    return [name for name in named if name not in alive and not any(p in alive for p in _partners(name))]


def _partners(name: str) -> list[str]:
    pairs = [pair for one, other in PARTNERS for pair in ((one, other), (other, one))]
    return [name.replace(f".{mine}.", f".{its}.") for mine, its in pairs if f".{mine}." in name]
