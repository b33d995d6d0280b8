"""Which device a name means."""

from __future__ import annotations

import torch

from decal.errors import ConfigError


def named(name: str | torch.device, *, fix: str) -> torch.device:
    """Return the device of that name. Raises ConfigError for one that there is not."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("no such device", got=name, fix=fix) from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError("this machine has no CUDA device", got=name, fix=fix)
        if (device.index or 0) >= count:
            raise ConfigError(f"this machine has {count} CUDA devices, from cuda:0 on", got=name, fix=fix)
    return device
