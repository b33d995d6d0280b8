"""The number format a run computes in; adapters and optimizer states are fp32 in all of them."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from decal.errors import ConfigError
from decal.model import devices

Name = Literal["auto", "fp32", "bf16", "fp16", "fp8"]
FP8_FROM = (9, 0)  # compute capability: Hopper


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What autocast computes in on `device`; fp32 means that there is no autocast.

    With `fp8` decoder layers compute their products in 8-bit floats where they train (ops/fp8.py).
    """

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device
    fp8: bool = False

    @property
    def setting(self) -> Name:
        """What `train.precision` says for this."""
        return "fp8" if self.fp8 else self.name

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
    elif name == "fp8":
        here = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if here is None or here < FP8_FROM:
            raise ConfigError(
                "fp8 trains on a CUDA card of compute capability 9.0 (Hopper) or later only",
                got=device if here is None else f"{torch.cuda.get_device_name(device)}, {here[0]}.{here[1]}",
                fix="Use train.precision=auto.",
            )
        return Precision(name="bf16", device=device, fp8=True)
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
