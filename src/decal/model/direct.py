"""A transformers body run by decal itself, layer by layer: its own forward pass, less what waits for the card.

transformers asks the card whether rows are packed, which nothing recorded for replay may do, and gives packed samples a
mask of all tokens against all. Here their bounds come from the host, once for each batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from decal.layers.block import LeanBlock
from decal.layers.host_embedding import HostEmbedding
from decal.ops.segments import Segments

# Of transformers: an embedding, layers that are all called alike, and a norm.
BODIES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel", "Phi3Model"}


def runs_directly(body: Any, longest: int) -> bool:
    """Return whether `run` gives what the body gives for samples of at most `longest` tokens, in training.

    The layers' last pass in training says so: a first one has to go through the body.
    """
    layers = getattr(body, "layers", None)
    if type(body).__name__ not in BODIES or not isinstance(layers, nn.ModuleList):
        return False
    if body._forward_hooks or body._forward_pre_hooks or body.config._attn_implementation != "sdpa":
        return False  # whoever hooked in would not be called; other attentions are not causal without a mask
    if longest > (getattr(body.config, "sliding_window", None) or longest) or not torch.is_grad_enabled():
        return False
    return all(isinstance(layer, LeanBlock) and layer.training and layer.whole for layer in layers)


def forget(body: Any) -> None:
    """Forget what a pass that was broken off left behind."""
    for layer in body.layers:
        layer.shelf.forget()


def embedded(body: Any, input_ids: Tensor) -> Tensor:
    """Return what `run` takes, where the ids are: token ids, or in host memory their rows if the table lies there."""
    table = body.embed_tokens
    return table.rows(input_ids) if isinstance(table, HostEmbedding) else input_ids


def run(body: Any, inputs: Tensor, places: Tensor | None, where: Segments | None) -> Tensor:
    """Return the last hidden states (B, S, D). `inputs` are of `embedded`, on the model's device as all the rest is.

    `places` (B, S) and `where` are those of packed rows; None where every row is one sample.
    """
    hidden: Tensor = inputs if inputs.is_floating_point() else body.embed_tokens(inputs)
    if places is None:
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotation = body.rotary_emb(hidden, position_ids=places)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotation, segments=where)
    out: Tensor = body.norm(hidden)
    return out
