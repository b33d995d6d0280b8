"""Make the linear layers of a model coded ones: while a 16-bit checkpoint streams in, or from a checkpoint of codes.

Loading goes through transformers' own hook for quantizers, so that every model it can load, it can load quantised: one
tensor at a time is wide.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from decal import rundir
from decal.errors import DecalError, Unsupported
from decal.files import bnb_files
from decal.files.bnb_files import Stored
from decal.files.checkpoint import SHARD, Writer
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear, check_bytes, scale_bytes
from decal.layers.streamed import StreamedLinear
from decal.model import streamed
from decal.model.inject import place
from decal.model.streamed import Weight
from decal.ops import nf4
from decal.spec import QuantConfig

METHOD = "decal"
Observe = Callable[[str, Tensor, CodedLinear], None]  # (name, W, its coded layer), for each weight as it is coded
LINEAR = (nn.Linear, Conv1D)
DENSE_SHARE = 0.05  # of the parameters outside embeddings and head that may stay wide unasked


@register_quantization_config(METHOD)
class Quantization(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """What transformers hands to `Quantizer`: the settings, or the stored state of each layer; the weights that stay

    in their files; what stayed wide.
    """

    def __init__(
        self,
        settings: QuantConfig | None = None,
        stored: dict[str, Stored] | None = None,
        observe: Observe | None = None,
        streamed: dict[str, Weight] | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.settings = settings
        self.stored = stored or {}
        self.observe = observe
        self.streamed = streamed or {}
        self.kept: list[str] = []
        self.refusal: DecalError | None = None


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Puts coded layers in the place of linear ones before the weights come, and encodes each weight as it comes."""

    requires_calibration = False
    quantization_config: Quantization

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        replace(model, self.quantization_config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, part = param_name.rpartition(".")
        return part in ("weight", "scales") and isinstance(model.get_submodule(name), CodedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return Encode(self.quantization_config)

    def is_serializable(self) -> bool:
        return False  # decal writes the common layout itself: model/quantized.py, write

    @property
    def is_trainable(self) -> bool:
        return True


class Encode(ConversionOps):  # type: ignore[misc]  # transformers has no types
    """Turns one weight into codes and scales."""

    def __init__(self, config: Quantization) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.rpartition(".")[0]
            layer = model.get_submodule(name)
            stored = self.config.stored.get(name)
            try:
                if stored is not None:  # transformers has cast the bytes to a float dtype, which holds 0 to 255 exactly
                    codes, scales = weight.flatten().to(torch.uint8), scale_bytes(stored.scales)
                    check_bytes(layer, codes, scales, key)
                else:
                    wide = weight.T if layer.transposed else weight
                    codes, scales = layer.encode(wide, key)
                    if self.config.observe is not None:
                        self.config.observe(name, wide, fill(copy.deepcopy(layer), codes, scales, key))
            except DecalError as error:
                self.config.refusal = error  # transformers would wrap it in a report of its own
                raise
            made[key] = codes
            made[f"{name}.scales"] = scales.to(codes.device)
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


def replace(model: Any, config: Quantization) -> None:
    """Put coded layers without values where linear ones are; raise Unsupported where too much would stay wide."""
    heads = {id(m) for m in (model.get_output_embeddings(), model.get_input_embeddings()) if m is not None}
    settings = config.settings
    skip = tuple(settings.skip) if settings is not None else ()
    kept: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        head = id(module) in heads
        if not own or isinstance(module, nn.Embedding) or (head and name not in config.streamed):
            continue
        skipped = head or any(part in name.split(".") or name == part for part in skip)
        wanted = name in config.stored or (settings is not None and type(module) in LINEAR and not skipped)
        if name in config.streamed:
            form = partial(_coded, module, None, settings) if wanted else None
            place(model, name, streamed.layer_of(config.streamed[name], module, form))
        elif wanted:
            layer = _coded(module, config.stored.get(name), settings)
            # transformers 5.17 casts what it reads to this dtype before it is encoded.
            layer.weight = nn.Parameter(layer.weight.to(module.weight.dtype), requires_grad=False)
            place(model, name, layer)
        else:
            kept[name] = sum(p.numel() for p in own)
    coded = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, CodedLinear))
    config.kept = list(kept)
    if coded == 0:
        raise Unsupported("the model has no linear layer to quantise", fix="Load it without quantize.")
    share = sum(kept.values()) / (coded + sum(kept.values()))
    if settings is not None and not settings.allow_dense and share > DENSE_SHARE:
        names = sorted(kept, key=lambda n: -kept[n])[:3]
        raise Unsupported(
            f"{100 * share:.0f}% of the parameters beside the embeddings would stay wide: {', '.join(names)}, ...",
            fix="Experts stored as 3-D parameters are not quantised yet. quantize.allow_dense=true goes on regardless.",
        )


def _coded(module: Any, stored: Stored | None, settings: QuantConfig | None) -> CodedLinear:
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


def arguments(
    path: Path,
    config: Any,
    settings: QuantConfig | None,
    observe: Observe | None = None,
    in_files: dict[str, Weight] | None = None,
) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load `path` quantised or streamed; {} where nothing is. Edits `config`.

    A checkpoint of 4-bit codes loads as what it is. Raises DecalError for other methods, and for quantising twice.
    """
    state = getattr(config, "quantization_config", None)
    if state is None:
        if in_files:
            asked = Quantization(settings, observe=observe, streamed=in_files)
            return {"quantization_config": asked, "state_dict": streamed.resident(path, in_files)}
        return {} if settings is None else {"quantization_config": Quantization(settings, observe=observe)}
    state = state if isinstance(state, dict) else state.to_dict()
    method = str(getattr(state.get("quant_method"), "value", state.get("quant_method")))
    if method != "bitsandbytes" or not (state.get("load_in_4bit") or state.get("_load_in_4bit")):
        raise Unsupported(
            f"the checkpoint is quantised with {method}",
            got=path,
            fix="Use the 16-bit checkpoint, or one that bitsandbytes quantised to 4 bits.",
        )
    if settings is not None:
        raise DecalError(
            "the checkpoint is quantised already, and quantising codes again would lose more",
            got=path,
            fix="Leave quantize out: it loads as it is. Or start from the 16-bit checkpoint.",
        )
    del config.quantization_config
    tensors, stored = bnb_files.read(path)
    return {"quantization_config": Quantization(stored=stored), "state_dict": tensors}


def adopt(model: nn.Module) -> int:
    """Put NF4Linear in the place of bitsandbytes' Linear4bit, with the same bytes; return how many."""
    count = 0
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit" or not type(module).__module__.startswith("bitsandbytes"):
            continue
        found: Any = module
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
    and the loss is computed in fp32 without. Only non-reentrant checkpointing, which reaches every adapter.
    """
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


def fill(layer: CodedLinear, codes: Tensor, scales: Tensor, name: str) -> CodedLinear:
    """Give a coded layer its bytes; return it."""
    check_bytes(layer, codes, scales, name)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.scales = nn.Parameter(scales.to(codes.device), requires_grad=False)
    return layer


def dense(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of the coded ones, in the dtype that each had before; return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedLinear):
            base = CodedBase(module)
            place(model, name, base.holding(base.dense(torch.float32)).train(module.training))
    return model


def write(model: Any, folder: Path) -> None:
    """Write a plain model as transformers does, its 4-bit layers as transformers and bitsandbytes do.

    Raises Unsupported for formats without a common layout. No more than one file of 2 GiB, one weight and what is not
    a linear layer are held.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CodedLinear)}
    forms = {name: m for name, m in layers.items() if not isinstance(m, StreamedLinear) or m.form is not None}
    bytes_of = {f"{name}.{part}" for name in layers for part in ("weight", "scales")}
    rest = {key: tensor for key, tensor in model.state_dict().items() if key not in bytes_of}
    model.save_pretrained(folder, state_dict=rest, max_shard_size=SHARD)
    found: CodedLinear | None = None
    with Writer(folder) as writer:
        for name, layer in layers.items():
            found = layer.coded() if isinstance(layer, StreamedLinear) else layer
            writer.add(dense_tensors(name, layer) if found is None else coded_tensors(name, found))
    if forms:
        assert isinstance(found, NF4Linear)
        wide = [
            name for name, m in model.named_modules() if type(m) in LINEAR or (name in layers and name not in forms)
        ]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = bnb_files.config(found.kind, found.block, found.double_quant, wide)
        rundir.write_json(folder / "config.json", config)


def dense_tensors(name: str, layer: CodedLinear) -> dict[str, Tensor]:
    """Return a coded layer's weight as a plain layer stores it, in the layer's dtype."""
    W = CodedBase(layer).dense(layer.dtype)
    return {f"{name}.weight": W.T.contiguous() if layer.transposed else W}


def coded_tensors(name: str, layer: CodedLinear) -> dict[str, Tensor]:
    """Return the tensors of a 4-bit layer in bitsandbytes' layout. Raises Unsupported for another format."""
    if not isinstance(layer, NF4Linear):
        raise Unsupported("only NF4 and FP4 have a common file layout", fix="Quantise to nf4 or fp4.")
    stored = Stored(
        kind=layer.kind,
        block=layer.block,
        shape=(layer.out_features, layer.in_features),
        dtype=layer.dtype,
        scales=layer.unpacked_scales(),
    )
    return bnb_files.parts_of(f"{name}.weight", layer.weight, stored)


def bits_per_weight(model: nn.Module) -> float:
    """Return the measured storage of the coded layers in bits per weight."""
    coded = [m for m in model.modules() if isinstance(m, CodedLinear)]
    stored = sum(m.weight.numel() + m.scales.numel() for m in coded)
    return 8 * stored / math.fsum(m.in_features * m.out_features for m in coded)
