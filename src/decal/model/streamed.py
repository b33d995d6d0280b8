"""Models whose linear weights stay in their files: each is read when it is needed, and forgotten.

So a model larger than memory can be run, slowly: what is held is what is not a linear layer (embeddings, norms).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.files.checkpoint import Checkpoint
from decal.layers.coded import CodedLinear
from decal.layers.streamed import StreamedLinear


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One linear layer's weight in its file."""

    checkpoint: Checkpoint
    key: str
    transposed: bool  # stored as (in, out)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return W (out, in)."""
        W = self.checkpoint.tensor(self.key)
        return (W.T if self.transposed else W).to(dtype)


def weights(folder: Path, model: nn.Module) -> dict[str, Weight]:
    """Return, by the layer's name, the weights in `folder` that a model (on the meta device) can leave there.

    These are those of linear layers that share theirs with nothing and stand in the files under the model's own names.
    """
    checkpoint = Checkpoint(folder)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or owners[id(module.weight)] > 1:
            continue
        key = f"{name}.weight"
        if key in checkpoint.file_of and checkpoint.shape(key) == tuple(module.weight.shape):
            found[name] = Weight(checkpoint=checkpoint, key=key, transposed=isinstance(module, Conv1D))
    return found


def resident(folder: Path, streamed: dict[str, Weight]) -> dict[str, Tensor]:
    """Return the tensors of `folder` that no layer leaves there."""
    checkpoint = Checkpoint(folder)
    left = {weight.key for weight in streamed.values()}
    return {key: checkpoint.tensor(key) for key in checkpoint.file_of if key not in left}


def layer_of(weight: Weight, module: Any, form: Callable[[], CodedLinear] | None) -> StreamedLinear:
    """Return the streamed layer that stands for `module`, a linear layer without values."""
    out_features, in_features = reversed(module.weight.shape) if weight.transposed else module.weight.shape
    dtype = module.weight.dtype
    layer = StreamedLinear(
        in_features,
        out_features,
        dtype=dtype,
        source=partial(weight.read, dtype),
        form=form,
        bias=module.bias,
        name=weight.key,
    )
    layer.transposed = weight.transposed
    return layer
