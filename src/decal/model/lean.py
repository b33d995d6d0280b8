"""Train with less memory and, on a card, in fewer kernels: known layers swap in forms that keep less for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from decal.errors import ConfigError
from decal.layers.adapted import AdaptedLinear
from decal.layers.block import FAMILIES, LeanBlock, block_of
from decal.layers.host_embedding import HostEmbedding, host_of
from decal.layers.lean import LeanGatedMLP, LeanRMSNorm, lean_of
from decal.layers.shelf import Shelf
from decal.model.inject import place
from decal.ops import dropout, fuse

Lean = LeanBlock | HostEmbedding | LeanGatedMLP | LeanRMSNorm
# Decoder layers that compute in 16 bits in spite of fp8. The first one's rounding grows in all that follow: without it
# the gradient's cosine with that of fp32 is 0.992, with it 0.986 (six layers, text; docs/performance.md).
FIRST_IN_16_BITS = 1


@contextmanager
def lean(model: nn.Module, *, embedding_on_host: bool = False, fp8: bool = False) -> Iterator[int]:
    """Swap the lean forms in for the time of the block; yields how many. The model afterwards is the very same.

    With `embedding_on_host` the table of the input embedding lies in host memory meanwhile; with `fp8` (see
    `require_fp8`) decoder layers but the first compute their products in 8-bit floats where they train. Masks of
    dropout are drawn again in backward, not kept, where that is quick.
    """
    adapters = [a for m in model.modules() if isinstance(m, AdaptedLinear) for a in m.adapters.values()]
    swapped: list[tuple[str, Lean]] = []
    shelf, blocks = Shelf(), 0
    device = next(model.parameters()).device
    one_function = fuse.on(device)
    inner = _inner(model)
    table = inner.get_input_embeddings() if embedding_on_host else None
    for name, module in list(model.named_modules()):
        new: Lean | None = lean_of(module)
        if new is None and table is not None and module is table:
            new = host_of(module, inner.get_output_embeddings())
        if new is None and one_function:
            new = block_of(module, shelf)
            if new is not None:
                new.fp8 = fp8 and blocks >= FIRST_IN_16_BITS
                blocks += 1
        if new is not None:
            new.train(module.training)
            place(model, name, new)
            swapped.append((name, new))
    for adapter in adapters:
        adapter.redraws = dropout.quick(device)
    try:
        yield len(swapped)
    finally:
        for adapter in adapters:
            adapter.redraws = False
        for name, new in swapped:
            original = new.back() if isinstance(new, HostEmbedding) else new.original
            place(model, name, original.train(new.training))


def require_fp8(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise ConfigError unless decoder layers can compute their products in 8-bit floats, from `dtype`."""
    shelf, was = Shelf(), model.training
    blocks = [block for module in model.modules() if (block := block_of(module, shelf)) is not None]
    layers = getattr(_inner(model).base_model, "layers", ())
    model.train()  # where dropout shows
    reasons = (block.why_not_fp8(dtype) for block in blocks)
    reason = next(filter(None, reasons), None)
    model.train(was)
    if len(blocks) < max(1, len(layers)):
        reason = f"its decoder layers must be those of {', '.join(FAMILIES)}, with frozen norms"
    elif len(blocks) <= FIRST_IN_16_BITS:
        reason = "it has one decoder layer, and the first stays in 16 bits"
    if reason is not None:
        raise ConfigError(f"this model cannot train in fp8: {reason}", fix="Use train.precision=auto.")


def _inner(model: nn.Module) -> Any:
    """Return the transformers model, adapted or not."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def general_note(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Return what to say of a swapped model on a card if its layers do not run as one function each, in `dtype`."""
    if not fuse.on(next(model.parameters()).device):
        return None
    blocks = [module for module in model.modules() if isinstance(module, LeanBlock)]
    why = f"the quick one is for {', '.join(FAMILIES)} with frozen norms"
    if blocks:
        reasons = [reason for block in blocks if (reason := block.why_general(dtype)) is not None]
        if not reasons:
            return None
        why = reasons[0]
    return f"this model's layers run in their general form, with equal results, slower and with more memory: {why}"
