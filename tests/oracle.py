"""The same model twice, once adapted by decal and once by PEFT, with the same weights in both."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

from decal.api import get_peft_model
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models

FP64 = {"rtol": 1e-10, "atol": 1e-12}  # fp64 sums in another order: about 1e-14 a layer, amplified by two layers


class Pair(NamedTuple):
    """decal's model and PEFT's."""

    ours: PeftModel
    theirs: Any


def theirs_of(model: Any, options: dict[str, Any], adapter: str = "default") -> Any:
    """Return `model` adapted by PEFT, without the warnings that PEFT gives where decal raises or writes a note."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=adapter)


def pair(kind: str, *, dtype: torch.dtype = torch.float64, size: float = 0.1, **options: Any) -> Pair:
    """Return one model adapted by both, all trained parameters random (an untrained adapter would hide everything)."""
    model, twin = models.twins(kind, dtype)
    theirs = theirs_of(twin, options)
    ours = get_peft_model(model, LoraConfig(**options))
    copy_weights(ours, theirs, randomize=size)
    return Pair(ours.eval(), theirs.eval())


def trained(model: Any) -> dict[str, Tensor]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def copy_weights(ours: PeftModel, theirs: Any, *, randomize: float) -> None:
    """Move every trained weight of PEFT's model a little and copy it to the weight of the same name of decal's."""
    mine, other = trained(ours), trained(theirs)
    assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
    generator = torch.Generator().manual_seed(5)
    for name, p in other.items():
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=randomize)
        assert mine[name].shape == p.shape, name
        assert mine[name].dtype == p.dtype, name
        mine[name].copy_(p)


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Return the logits for token ids (rows, length)."""
    out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits
    return out


def gradients(model: Any, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Return the gradient of a fixed weighted sum of the logits in every trained parameter."""
    out = logits(model, ids, **kwargs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    model.zero_grad()
    (out * weights).sum().backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Compare two sets of named tensors."""
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], **tolerance, msg=partial("{}: {}".format, name))


def settings(folder: Path) -> dict[str, Any]:
    """Return an adapter_config.json with its lists in one order (PEFT writes sets)."""
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()}
