"""The number format a run computes in; adapters and optimizer states are fp32 in all of them."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from decal.errors import ConfigError
from decal.model import devices

Name = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What autocast computes in on `device`; fp32 means that there is no autocast."""

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler that keeps fp16 gradients from vanishing; it does nothing in the other formats."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve(name: Name, device: torch.device) -> Precision:
    """Return the precision a setting means on `device`: `auto` is bf16 on a GPU that has it, fp16 on one that has
    not, fp32 elsewhere (a CPU without AMX computes bf16 many times slower than fp32)."""
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "fp16" and device.type != "cuda":
        raise ConfigError("fp16 trains on a CUDA device only", got=str(device), fix="Use train.precision=auto.")
    return Precision(name=name, device=device)


def cpu_has_bf16() -> bool:
    """Return whether this processor has instructions for bf16 products; of others than x86-64 it is taken to be so."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pick_device(name: str) -> torch.device:
    """Return the device a setting means: `auto` is the accelerator if there is one, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    return devices.named(name, fix="Use train.device=auto, cpu, cuda or cuda:1.")
