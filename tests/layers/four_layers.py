"""Four Llama layers in bf16, in codes or not, with an adapter whose factors are both random; and the same in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.dense import DenseBase
from decal.model import quantized
from decal.model.inject import place
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig, QuantConfig


def make(
    sizes: dict[str, Any], quantize: str | None, *, rank: int, device: str = "cpu", of_head: str = "wide"
) -> PeftModel:
    """Return the model in training; `sizes` are LlamaConfig's."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=4, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(device, torch.bfloat16)
    if quantize is not None:
        settings, head = QuantConfig(format=quantize, head=of_head), model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            how = settings.of_head() if module is head else settings
            if isinstance(module, nn.Linear) and how is not None:
                layer = quantized.room_for(module, None, how)
                layer.in_slabs = module is head
                place(model, name, quantized.fill(layer, *layer.encode(module.weight.detach(), name), name))
    return with_adapter(model, rank=rank)


def with_adapter(model: Any, *, rank: int) -> PeftModel:
    """Return the model with a change of about a tenth of its weights."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    adapted = PeftModel(model, lora, generator=torch.Generator().manual_seed(2)).train()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.mul_(0.1)
    return adapted


def widened(model: nn.Module) -> nn.Module:
    """Return it in fp32, what is coded decoded first."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(CodedBase(module).dense(torch.float32), requires_grad=False)
            place(model, name, dense)
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.base = DenseBase(dense)  # type: ignore[assignment]  # an adapted layer's
    return model.float()
