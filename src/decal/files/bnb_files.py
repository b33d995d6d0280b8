"""bitsandbytes' layout of 4-bit checkpoints, read and written without bitsandbytes.

For each weight `W` of the model: `W` (the packed codes, uint8, any shape), `W.absmax` (fp32, or uint8 codes of the
nested map), `W.quant_map` (the 16 levels), `W.quant_state.bitsandbytes__nf4` or `__fp4` (JSON as uint8: quant_type,
blocksize, dtype, shape and, if nested, nested_blocksize, nested_dtype, nested_offset), and if nested
`W.nested_absmax` (fp32) and `W.nested_quant_map` (the 256 values).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from decal.errors import DecalError
from decal.ops import dynamic8, nf4

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One weight's state beside its codes."""

    kind: Any  # nf4 or fp4
    block: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: nf4.Scales


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """Return the tensors of a checkpoint without the parts of quantised weights, and those by layer's name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise DecalError(f"{file.name} is damaged ({error})", got=file, fix="Download it again.") from None
    stored = {}
    for key in [key for key in tensors if STATE in key]:
        weight, _, kind = key.partition(STATE)
        parts = {part[1:]: tensors.pop(weight + part) for part in PARTS if weight + part in tensors}
        if weight not in tensors:
            raise DecalError(f"the codes of {weight!r} are missing", got=folder, fix="Download the checkpoint again.")
        tensors[weight] = tensors[weight].view(torch.uint8)  # some are stored under a float dtype, for sharding
        stored[weight.rpartition(".")[0]] = _stored(weight, kind, tensors.pop(key), parts)
    if not stored:
        raise DecalError(
            "the configuration says that the checkpoint is quantised, and no weight is",
            got=folder,
            fix="Remove quantization_config from config.json if the weights are plain.",
        )
    return tensors, stored


def _stored(weight: str, kind: str, state: Tensor, parts: dict[str, Tensor]) -> Stored:
    try:
        facts = json.loads(bytes(state.tolist()).decode())
        block, shape = int(facts["blocksize"]), tuple(int(n) for n in facts["shape"])
        dtype = getattr(torch, facts["dtype"])
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and block > 0):
            raise ValueError(f"dtype {facts['dtype']}, blocks of {block}")
        scales: nf4.Scales = parts["absmax"]
        if "nested_absmax" in parts:
            offset = torch.tensor(float(facts["nested_offset"]))
            scales = nf4.Nested(codes=parts["absmax"].flatten(), absmax=parts["nested_absmax"], offset=offset)
            same = torch.equal(parts["nested_quant_map"], dynamic8.table(torch.device("cpu")))
            known = same and int(facts["nested_blocksize"]) == dynamic8.BLOCK
            if not bool(offset.isfinite() & parts["nested_absmax"].isfinite().all()):
                raise ValueError("nested scales that are not finite")
        else:
            known = parts["absmax"].dtype == torch.float32
        known = known and torch.equal(parts["quant_map"], nf4.levels(kind, torch.device("cpu")))
        blocks = -(-math.prod(shape) // block)
    except (KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DecalError(
            f"the quantisation state of {weight!r} is truncated or of another layout ({type(error).__name__}: {error})",
            fix="Download the checkpoint again.",
        ) from None
    if not known or parts["absmax"].numel() != blocks:
        raise DecalError(
            f"{weight!r} is stored with tables or blocks that decal does not know",
            got=f"{kind}, blocks of {block}, {parts['absmax'].numel()} scales for {blocks} blocks",
            fix="Quantise the 16-bit checkpoint again.",
        )
    return Stored(kind=kind, block=block, shape=shape, dtype=dtype, scales=scales)


def of_state(state: Any, name: str) -> Stored:
    """Return the state that a bitsandbytes QuantState object holds."""
    nested = state.state2 is not None
    if nested and state.state2.blocksize != dynamic8.BLOCK:
        raise DecalError(
            f"{name!r} has nested blocks of {state.state2.blocksize}", fix="Quantise it with bnb's defaults."
        )
    scales: nf4.Scales = state.absmax.float() if not nested else state.absmax
    if nested:
        scales = nf4.Nested(codes=state.absmax.flatten(), absmax=state.state2.absmax, offset=state.offset)
    shape = tuple(state.shape)
    return Stored(kind=state.quant_type, block=state.blocksize, shape=shape, dtype=state.dtype, scales=scales)


def parts_of(weight: str, codes: Tensor, stored: Stored) -> dict[str, Tensor]:
    """Return the tensors under which one quantised weight is written."""
    facts: dict[str, Any] = {
        "quant_type": stored.kind,
        "blocksize": stored.block,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    cpu = torch.device("cpu")
    parts = {weight: codes.view(-1, 1), f"{weight}.quant_map": nf4.levels(stored.kind, cpu).clone()}
    if isinstance(stored.scales, nf4.Nested):
        facts |= {"nested_blocksize": dynamic8.BLOCK, "nested_dtype": "float32"}
        facts["nested_offset"] = float(stored.scales.offset)
        parts[f"{weight}.absmax"] = stored.scales.codes
        parts[f"{weight}.nested_absmax"] = stored.scales.absmax
        parts[f"{weight}.nested_quant_map"] = dynamic8.table(cpu).clone()
    else:
        parts[f"{weight}.absmax"] = stored.scales
    parts[f"{weight}{STATE}{stored.kind}"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {name: tensor.detach().cpu().clone() for name, tensor in parts.items()}  # views of one storage


def config(kind: str, block: int, double_quant: bool, wide: list[str]) -> dict[str, Any]:
    """Return the quantization_config of a checkpoint of this layout; `wide` are the linear layers left as they were."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_blocksize": block,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": wide,
    }
