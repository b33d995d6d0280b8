"""A model of any configuration with random weights: for measurements, which do not depend on what the weights are."""

from __future__ import annotations

import os

import torch
from torch import nn

from decal.model import load, quantized, quantizer
from decal.model.inject import place
from decal.model.targets import output_head
from decal.spec import QuantConfig


def random_model(
    name: str | os.PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: QuantConfig | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return the causal model of `name`'s config.json, drawn on the device one module at a time; nothing is downloaded
    but the config.

    Weights are `dtype`, drawn as the model's own class starts them; with `quantize` every linear layer is
    coded as soon as it is drawn (the head if `quantize.head` says so), so that the peak is the model's final size and
    one layer. The global generators are left as they were.
    """
    model = load.meta_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not model.to: the rotary tables stay fp32
    head, of_head = output_head(model), None if quantize is None else quantize.of_head()
    if of_head is not None:
        quantizer.check_head(model, of_head)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for path, module in list(model.named_modules()):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)  # type: ignore[operator]  # transformers' own start of each kind of module
            how = of_head if module is head else quantize
            if how is not None and type(module) in quantized.LINEAR:
                layer = quantized.room_for(module, None, how)
                layer.in_slabs = module is head
                place(model, path, quantized.fill(layer, *layer.encode(_out_in(module), path), path))
    model.tie_weights()  # type: ignore[operator]  # transformers' method
    model.requires_grad_(False)
    return model.eval()


def _out_in(module: nn.Module) -> torch.Tensor:
    """Return the weight as (out, in); GPT-2's Conv1D stores the transpose."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, nn.Linear) else weight.T.contiguous()
