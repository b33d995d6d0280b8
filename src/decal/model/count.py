"""How many parameters an adapter trains, from a configuration alone: nothing is downloaded, nothing computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from decal.layers.adapted import Adapted
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Count:
    """One line of the table. `total` includes the adapter, as PEFT counts; sizes are of fp32 factors, in 10^6 bytes."""

    rank: int
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    @property
    def adapter_mb(self) -> float:
        return self.trainable * 4 / 1e6


def count(model: nn.Module, config: LoraConfig, ranks: Sequence[int]) -> list[Count]:
    """Return a line for each rank. `model` may lie on the meta device; it is left as it was."""
    lines = []
    for rank in ranks:
        adapted = PeftModel(model, config.model_copy(update={"r": rank}), low_cpu_mem_usage=True)
        trainable, total = adapted.get_nb_trainable_parameters()
        lines.append(Count(rank=rank, trainable=trainable, total=total))
        adapted.unload()
    return lines


def per_module(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Return {last name of the layers: (how many, trainable parameters in all of them)} for one configuration."""
    adapted = PeftModel(model, config, low_cpu_mem_usage=True)
    lines: dict[str, tuple[int, int]] = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, Adapted):
            end = name.rpartition(".")[2]
            layers, parameters = lines.get(end, (0, 0))
            lines[end] = layers + 1, parameters + sum(p.numel() for p in layer.trainable("default"))
    adapted.unload()
    return lines
