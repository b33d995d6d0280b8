"""The layer between PeftModel and the model, so that parameter names equal PEFT's (`base_model.model.`...)."""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapters(nn.Module):
    """Holds the model as `model`, runs it, and answers for it where it is asked for anything else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)
