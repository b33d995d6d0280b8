"""What other libraries' trainers do with a model behind its back, and where that would go wrong without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from decal.errors import Unsupported
from decal.layers.coded import CodedLinear
from decal.layers.dense import SIXTEEN_BIT, WideLinear
from decal.layers.replaced import ReplacedModule
from decal.model import targets


def refuse_fused_head(model: nn.Module) -> None:
    """Raise Unsupported where TRL, which multiplies by the head's stored weight itself, would pass an adapter over.

    TRL's trainers score through `lm_head.weight` (`fused_lm_head=True`): an adapter on the head, or trained token rows
    that a tied head shares, would be neither used nor trained. A whole trained head (modules_to_save) is.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    if not isinstance(head, nn.Module):
        return
    plain: Any = targets.original(head)
    if isinstance(plain, CodedLinear):
        raise Unsupported(
            "TRL's trainers multiply by the output head's stored weight, and this one is stored in codes",
            got=type(plain).__name__,
            fix="Load the model without quantize.head, or train with decal.train.",
        )
    if plain is not head and not isinstance(head, ReplacedModule):
        raise Unsupported(
            "TRL's trainers multiply by the output head's stored weight, past the adapter that is on it",
            got=type(head).__name__,
            fix="Leave the head (and a tied embedding) out of target_modules and trainable_token_indices, or train "
            "with decal.train.",
        )
    narrow = isinstance(plain, WideLinear) and plain.weight.dtype in SIXTEEN_BIT
    if narrow and not torch.is_autocast_enabled(plain.weight.device.type):
        raise Unsupported(
            "TRL's trainers multiply by the head's stored 16-bit weight, and this model computes in fp32",
            fix='Load it with dtype="fp32" (or train with bf16=True), or train with decal.train.',
        )
