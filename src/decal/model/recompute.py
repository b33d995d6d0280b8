"""Activation checkpointing of a model with adapters: what was in force at forward is in force at recompute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from decal.errors import Unsupported
from decal.layers.routing import Switch


def enable(model: nn.Module, switch: Switch, given: Mapping[str, Any], *, every_n_layers: int, offload: bool) -> None:
    """Switch transformers' checkpointing on, non-reentrant and with the switch's context. Raises Unsupported else."""
    settings = dict(given)
    if settings.pop("use_reentrant", False):
        raise Unsupported(
            "reentrant checkpointing loses the adapters' routing",
            fix='Use {"use_reentrant": False}, the default here.',
        )
    if settings.pop("context_fn", None) is not None:
        raise Unsupported(
            "checkpointing takes one context_fn, and the adapters need it (TRL's `selective` brings its own)",
            fix="Leave `selective` and `context_fn` out, or train with decal.train.",
        )
    settings.update(use_reentrant=False, context_fn=switch.checkpoint_contexts)
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()  # type: ignore[operator]  # else each call adds another hook
    older: Any = model.gradient_checkpointing_enable
    newer: Any = getattr(model, "activation_checkpointing_enable", older)
    newer(settings, every_n_layers, offload)  # it lets the embedding's output need a gradient, too
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.offloads_checkpoint = offload  # type: ignore[assignment]  # for layers/block.py
