"""The model of a run without values: the modules that training would use, on tensors that have only a shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decal.errors import ConfigError
from decal.layers.coded import Coded
from decal.model import load, quantizer
from decal.model.inject import place
from decal.model.wrapper import PeftModel
from decal.planning.wanted import Wanted


def trainable(wanted: Wanted) -> Any:
    """Return the model on the meta device, stored, adapted and set to training as training would have it.

    Only its configuration is read. Raises DecalError for what training would refuse.
    """
    model: Any = load.meta_model(wanted.model, revision=wanted.revision)
    store(model, stored_dtype(model, wanted))
    if wanted.quantize is not None:
        code(model, wanted)
    if wanted.device == "cpu" and not wanted.stored_wide:
        load.compute_in_fp32(model)
    model.eval()
    if wanted.full:
        model.requires_grad_(True)
    else:
        model = PeftModel(model, wanted.lora, low_cpu_mem_usage=True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "nothing is trainable, so training would change nothing",
            fix="Set lora.inference_mode to false and give lora.target_modules.",
        )
    if wanted.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def stored_dtype(model: Any, wanted: Wanted) -> torch.dtype:
    """Return the dtype that the weights have in memory where they are not coded."""
    if wanted.stored_wide:
        return torch.float32
    named = getattr(model.config, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def store(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every floating parameter a dtype; buffers keep theirs, as in loading."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def code(model: Any, wanted: Wanted) -> None:
    """Put coded layers where loading would put them."""
    config = quantizer.Quantization(wanted.quantize)
    quantizer.replace(model, config)
    for name, experts in config.experts.items():
        place(model, name, experts)
    for module in model.modules():
        if isinstance(module, Coded):  # a linear one's codes had the dtype that they are read in
            module.weight = nn.Parameter(module.weight.to(torch.uint8), requires_grad=False)


def layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of a model's layers; an empty one where the model has none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    depth = _config(model).num_hidden_layers
    return next((found for found in lists if len(found) == depth), nn.ModuleList())


def _config(model: nn.Module) -> Any:
    unwrap: Any = getattr(model, "get_base_model", None)
    inner: Any = model if unwrap is None else unwrap()
    return inner.config.get_text_config()


def alike(model: nn.Module) -> list[tuple[object, ...]]:
    """Return what makes two layers take the same memory and time, for each layer."""
    kinds = getattr(_config(model), "layer_types", None)
    return [
        (
            kinds[i] if kinds else None,
            *((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()),
        )
        for i, layer in enumerate(layers(model))
    ]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How many layers are counted, which of them stand for others, and how many times more."""

    layers: int
    middle: tuple[int, int]  # first, and one after the last
    copies: int


def depth(kinds: list[tuple[object, ...]]) -> Depth:
    """Return the smallest depth that shows all: a period of like layers between two others, or all layers."""
    count = len(kinds)
    for period in range(1, count // 4 + 1):
        start = count
        while start > period and kinds[start - 1] == kinds[start - 1 - period]:
            start -= 1
        start = max(start - period, 0)  # from here on every layer is like the one a period later
        copies = (count - start) // period - 3
        if copies > 0:
            layers = count - copies * period
            return Depth(layers=layers, middle=(layers - 2 * period, layers - period), copies=copies)
    return Depth(layers=count, middle=(0, 0), copies=0)


@contextmanager
def cut(model: nn.Module, depth: int) -> Iterator[None]:
    """Leave a model its first layers alone inside the block."""
    found, config = layers(model), _config(model)
    whole, count = dict(found._modules), config.num_hidden_layers
    if depth < count:
        for name in list(found._modules)[depth:]:
            del found._modules[name]
        config.num_hidden_layers = depth
    try:
        yield
    finally:
        found._modules.update(whole)
        config.num_hidden_layers = count


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Put tensors without values, on the CPU, in the place of those on the meta device; use it in a fake mode."""
    made: dict[int, nn.Parameter] = {}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            before.append((held, dict(held)))
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                held[name] = made[id(tensor)]
    try:
        yield
    finally:
        for held, old in before:
            held.update(old)
