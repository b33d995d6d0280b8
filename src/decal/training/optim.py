"""The optimizers with their parameter groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from decal.spec import TrainConfig
from decal.training.adamw8bit import AdamW8bit
from decal.training.paged import Paged, free_bytes, quiet

PAGED = "paged_"
FUSED = ("cuda", "cpu")  # devices where AdamW moves all weights in one kernel


def build(
    model: nn.Module, config: TrainConfig, *, say: Callable[[str], object] = quiet
) -> torch.optim.AdamW | AdamW8bit | Paged:
    """Return `config.optimizer`, a kind of AdamW (Loshchilov & Hutter 2019), over the model's trainable parameters.

    `say` is told when a paged one moves its states, or has no card to move them from.
    """
    groups = parameter_groups(model, config)
    device: torch.device = groups[0]["params"][0].device
    optimizer = resident(groups, config)
    kind = config.optimizer.removeprefix(PAGED)
    if kind == config.optimizer:
        return optimizer
    if device.type != "cuda":
        say(f"train.optimizer={config.optimizer} pages on a CUDA card only; here it is {kind}, with equal results")
        return optimizer
    return Paged(optimizer, device=device, free=partial(free_bytes, device), say=say)


def resident(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.AdamW | AdamW8bit:
    """Return `config.optimizer` over such groups, with its states where the parameters are."""
    if config.optimizer.removeprefix(PAGED) == "adamw8bit":
        return AdamW8bit(groups, lr=config.lr, betas=config.betas)
    device: torch.device = groups[0]["params"][0].device
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device.type in FUSED)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups, each with its learning rate and decay.

    With `loraplus_lr_ratio`, lora_B and one-dimensional parameters learn that many times faster (LoRA+, Hayou et al.
    2024), as PEFT's `create_loraplus_optimizer` groups them; embedding adapters keep `lr` (PEFT's own default for
    them, 1e-6, all but freezes them). Biases, norms and DoRA magnitudes (all one-dimensional) are never decayed.
    """
    ratio = config.loraplus_lr_ratio or 1.0
    sorted_out: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        embedding = "lora_embedding_" in name
        fast = not embedding and ("lora_B" in name or parameter.ndim == 1)
        decay = 0.0 if parameter.ndim <= 1 else config.weight_decay
        sorted_out.setdefault((config.lr * ratio if fast else config.lr, decay), []).append((name, parameter))
    return [
        {
            "params": [p for _, p in named],
            "names": [name for name, _ in named],
            "lr": lr,
            "initial_lr": lr,
            "weight_decay": decay,
        }
        for (lr, decay), named in sorted_out.items()
    ]


def _ramp(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def cosine(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at `step` (from 0): up in a line, down in half a cosine to 0."""
    if step < warmup:
        return _ramp(step, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def linear(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at `step` (from 0): up in a line, down in a line to 0."""
    if step < warmup:
        return _ramp(step, warmup)
    return max(0.0, (steps - step) / max(1, steps - warmup))


def constant(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at `step` (from 0): up in a line, then all of it."""
    return _ramp(step, warmup) if step < warmup else 1.0


SCHEDULES: Mapping[str, Callable[[int, int, int], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to that share of what it began with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
