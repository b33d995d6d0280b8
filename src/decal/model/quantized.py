"""Act on models in codes: change layers into coded ones and back, write them, measure their storage.

Coding while a checkpoint loads: model/quantizer.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal import rundir
from decal.errors import Unsupported
from decal.files import bnb_files
from decal.files.bnb_files import Stored
from decal.files.checkpoint import SHARD, Writer
from decal.layers.coded import Coded, CodedBase, CodedLinear
from decal.layers.coded_experts import CodedExperts
from decal.layers.dense import widened
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear, check_bytes, scale_bytes
from decal.layers.streamed import StreamedLinear
from decal.model.inject import place
from decal.ops import nf4
from decal.spec import QuantConfig
from decal.words import counted

LINEAR = (nn.Linear, Conv1D)
Layer = TypeVar("Layer", bound=Coded)


def room_for(module: Any, stored: Stored | None, settings: QuantConfig | None) -> CodedLinear:
    """Return a coded layer without values for a linear one: of its stored state's format, or of the settings'."""
    transposed = isinstance(module, Conv1D)
    out_features, in_features = reversed(module.weight.shape) if transposed else module.weight.shape
    sizes: dict[str, Any] = {"in_features": in_features, "out_features": out_features, "bias": module.bias}
    layer: CodedLinear
    if stored is not None:
        how = {"kind": stored.kind, "block": stored.block, "double_quant": isinstance(stored.scales, nf4.Nested)}
        layer = NF4Linear(**sizes, **how, dtype=stored.dtype)
    elif settings is not None and settings.format == "int8":
        layer = Int8Linear(**sizes, dtype=module.weight.dtype)
    else:
        assert settings is not None
        how = {"kind": settings.format, "block": settings.block, "double_quant": settings.double_quant}
        layer = NF4Linear(**sizes, **how, dtype=module.weight.dtype)
    layer.transposed = transposed
    return layer


def room_for_experts(W: Tensor, transposed: bool, settings: QuantConfig | None) -> CodedExperts:
    """Return room for the codes of W, (experts, out, in) or transposed (experts, in, out)."""
    count, rows, columns = W.shape
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    plain = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=W.dtype)
    one = room_for(plain, None, settings)
    one.transposed = transposed
    return CodedExperts(one, count)


def adopt(model: nn.Module) -> int:
    """Put NF4Linear in the place of bitsandbytes' Linear4bit, with the same bytes; return how many."""
    count = 0
    for name, module in list(model.named_modules()):
        kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(module).__mro__}
        if "bitsandbytes.Linear4bit" not in kinds:  # LinearNF4 and LinearFP4 are kinds of it
            continue
        found: Any = module
        if getattr(found.weight, "quant_state", None) is None:
            raise Unsupported(
                "a layer of bitsandbytes is not quantised yet", got=name, fix="Move the model to its device first."
            )
        stored = bnb_files.of_state(found.weight.quant_state, name)
        layer = NF4Linear(
            found.in_features,
            found.out_features,
            dtype=stored.dtype,
            bias=found.bias,
            kind=stored.kind,
            block=stored.block,
            double_quant=isinstance(stored.scales, nf4.Nested),
        )
        fill(layer, found.weight.data.contiguous().view(torch.uint8).flatten(), scale_bytes(stored.scales), name)
        place(model, name, layer.train(module.training))
        count += 1
    return count


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze `model`, compute its norms in fp32, and checkpoint its layers (PEFT's function of this name); return it.

    Embeddings and head keep their dtype: fp32 copies of them would cost 2 GiB and a fifth of the speed on an 8B model,
    and the loss is computed in fp32 without. 16-bit linear layers widen their weight for an fp32 input as they use it.
    Only non-reentrant checkpointing, which reaches every adapter.
    """
    for name, module in list(model.named_modules()):
        wide = widened(module) if type(module) in LINEAR else None
        if wide is not None:
            place(model, name, wide)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point() and parameter.dim() == 1:
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            raise Unsupported(
                "reentrant checkpointing gives adapters no gradient unless the input has one",
                fix="Use use_reentrant=False.",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model


def fill(layer: Layer, codes: Tensor, scales: Tensor, name: str) -> Layer:
    """Give a coded layer its bytes; return it."""
    check_bytes(layer, codes, scales, name)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.scales = nn.Parameter(scales.to(codes.device), requires_grad=False)
    return layer


def dense(model: nn.Module) -> nn.Module:
    """Put plain layers and parameters in the place of the coded ones, in the dtype that each had; return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedLinear):
            base = CodedBase(module)
            place(model, name, base.holding(base.dense(torch.float32)).train(module.training))
        elif isinstance(module, CodedExperts):
            place(model, name, nn.Parameter(module.dense(module.one.dtype), requires_grad=False))
    return model


def refuse_experts(names: Collection[str]) -> None:
    """Raise Unsupported if there are coded experts: the common file layout has none."""
    if names:
        raise Unsupported(
            "the 4-bit file layout has no experts that are stored as 3-D parameters",
            got=f"{next(iter(names))} and {len(names) - 1} more",
            fix="Keep the 16-bit checkpoint: with --quantize its experts are coded each time it is loaded.",
        )


def write(model: Any, folder: Path) -> None:
    """Write a plain model as transformers does, its 4-bit layers as transformers and bitsandbytes do.

    Raises Unsupported for formats without a common layout. No more than one file of 2 GiB, one weight and what is not
    a linear layer are held.
    """
    refuse_experts([name for name, m in model.named_modules() if isinstance(m, CodedExperts)])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CodedLinear)}
    forms = {name: m for name, m in layers.items() if not isinstance(m, StreamedLinear) or m.form is not None}
    kinds = {_form(m.form() if isinstance(m, StreamedLinear) and m.form is not None else m) for m in forms.values()}
    if "int8" in kinds:
        raise Unsupported("only NF4 and FP4 have a common file layout", fix="Quantise to nf4 or fp4.")
    if len(kinds) > 1:
        raise Unsupported(
            "the common file layout has one 4-bit format for a model",
            got=" and ".join(sorted(kinds)),
            fix="Quantise the output head as the layers are, or leave quantize.head out.",
        )
    bytes_of = {f"{name}.{part}" for name in layers for part in ("weight", "scales")}
    rest = {key: tensor for key, tensor in model.state_dict().items() if key not in bytes_of}
    type(model).save_pretrained(model, folder, state_dict=rest, max_shard_size=SHARD)
    last: CodedLinear | None = None
    with Writer(folder) as writer:
        for name, layer in layers.items():
            coded = layer.coded() if isinstance(layer, StreamedLinear) else layer
            writer.add(dense_tensors(name, layer) if coded is None else coded_tensors(name, coded))
            last = last if coded is None else coded
    if last is not None:
        assert isinstance(last, NF4Linear)
        wide = [n for n, m in model.named_modules() if type(m) in LINEAR or (n in layers and n not in forms)]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = bnb_files.config(last.kind, last.block, last.double_quant, wide)
        rundir.write_json(folder / "config.json", config)


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], **how: object) -> None:
    """Write a model that has coded layers by its own `save_pretrained`: in the common layout, not as decal's bytes."""
    asked = {name: value for name, value in how.items() if value not in (None, True)}
    if asked:
        raise Unsupported(
            "a quantised model is saved whole, in files of 2 GiB",
            got=", ".join(asked),
            fix="Call save_pretrained(folder) alone.",
        )
    folder = Path(save_directory)
    with rundir.writing(folder):
        write(model, folder)


def dense_tensors(name: str, layer: CodedLinear) -> dict[str, Tensor]:
    """Return a coded layer's weight as a plain layer stores it, in the layer's dtype."""
    W = CodedBase(layer).dense(layer.dtype)
    return {f"{name}.weight": W.T.contiguous() if layer.transposed else W}


def coded_tensors(name: str, layer: CodedLinear) -> dict[str, Tensor]:
    """Return the tensors of a 4-bit layer in bitsandbytes' layout."""
    assert isinstance(layer, NF4Linear), "`write` has looked"
    stored = Stored(
        kind=layer.kind,
        block=layer.block,
        shape=(layer.out_features, layer.in_features),
        dtype=layer.dtype,
        scales=layer.unpacked_scales(),
    )
    return bnb_files.parts_of(f"{name}.weight", layer.weight, stored)


def storage(model: nn.Module) -> list[str]:
    """Return one line that says what of a model is coded, in how many bits, and what is not; none for a plain model."""
    coded = [m for m in model.modules() if isinstance(m, Coded)]
    if not coded:
        return []
    heads = [m for m in coded if isinstance(m, CodedLinear) and m.in_slabs]
    of_head = f", the output head in {_form(heads[0])}" if heads else ""
    wide = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if _holds_a_matrix(m)]
    some = ", ".join(wide[:4]) + (f" and {len(wide) - 4} more" if len(wide) > 4 else "")
    bits = bits_per_weight(model)
    layers = counted(len(coded) - len(heads), "layer")
    form = f"{layers} stored in {_form(coded[0])}{of_head}, {bits:.3f} bits per weight"
    return [f"{form}; in 16 or 32 bits stay {some}"]


def _form(layer: Coded) -> str:
    one = layer.one if isinstance(layer, CodedExperts) else layer
    return one.kind if isinstance(one, NF4Linear) else "int8"


def _holds_a_matrix(module: nn.Module) -> bool:
    """Whether a module of the model itself (no adapter's) has a frozen parameter of two or more dimensions, uncoded."""
    own = [p for p in module.parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()]
    return any(not p.requires_grad for p in own) and not isinstance(module, Coded)


def bits_per_weight(model: nn.Module) -> float:
    """Return the measured storage of the coded layers and experts in bits per weight."""
    coded = [m for m in model.modules() if isinstance(m, Coded)]
    stored = sum(m.weight.numel() + m.scales.numel() for m in coded)
    return 8 * stored / math.fsum(m.weights for m in coded)
