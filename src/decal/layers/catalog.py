"""The two tables: storage formats and kinds of adapters. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from decal.layers.coded import CodedBase
from decal.layers.dense import Conv1DBase, DenseBase, WideConv1D, WideLinear
from decal.layers.dora import DoRA
from decal.layers.embedding import EmbeddingDoRA, EmbeddingLoRA
from decal.layers.int8_linear import Int8Linear
from decal.layers.lora import LinearLoRA, LoRA, ResidualLoRA
from decal.layers.nf4_linear import NF4Linear
from decal.layers.owned import OwnedBase, is_owned
from decal.layers.seams import Base
from decal.layers.streamed import StreamedLinear
from decal.spec import LoraConfig

FORMATS: dict[type[nn.Module], Callable[[Any], Base]] = {
    nn.Linear: DenseBase,
    WideLinear: DenseBase,
    Conv1D: Conv1DBase,
    WideConv1D: Conv1DBase,
    NF4Linear: CodedBase,
    Int8Linear: CodedBase,
    StreamedLinear: CodedBase,
}
ADAPTERS: dict[str, type[LoRA]] = {"lora": LinearLoRA, "residual": ResidualLoRA, "dora": DoRA}
EMBEDDING_ADAPTERS: dict[str, type[LoRA]] = {"lora": EmbeddingLoRA, "dora": EmbeddingDoRA}


def adapter_kind(config: LoraConfig) -> Literal["lora", "residual", "dora"]:
    """Return the line of ADAPTERS that a configuration asks for."""
    if config.use_dora:
        return "dora"
    return "residual" if config.init_lora_weights in ("pissa", "olora") else "lora"


def base_of(layer: nn.Module) -> Base | None:
    """Return the layer seen as a frozen weight, or None if its class is in no line of FORMATS and no library's own.

    Exact classes only: a library's subclass may store or multiply its weight in a way that the table does not know.
    """
    view = FORMATS.get(type(layer))
    if view is not None:
        return view(layer)
    return OwnedBase(layer) if is_owned(layer) else None
