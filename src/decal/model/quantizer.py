"""Code a model's linear layers and experts while a 16-bit checkpoint streams in, or load a checkpoint of codes.

Loading goes through transformers' own hook for quantizers, so that every model it can load, it can load quantised: one
tensor at a time is wide. All experts of a layer are one tensor, which transformers puts together first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from decal.errors import DecalError, Unsupported
from decal.files import bnb_files
from decal.files.bnb_files import Stored
from decal.layers.coded import Coded, CodedLinear
from decal.layers.coded_experts import CodedExperts
from decal.layers.nf4_linear import check_bytes, scale_bytes
from decal.model import experts, quantized, streamed
from decal.model.inject import place
from decal.model.streamed import Weight
from decal.model.targets import HEADS
from decal.spec import QuantConfig, TaskType

METHOD = "decal"
# (name, W (out, in), its coded layer), for each weight as it is coded; all experts of one parameter have one name
Observe = Callable[[str, Tensor, CodedLinear], None]
WIDE_HEAD = "Leave quantize.head out: the head stays as it is stored."
DENSE_SHARE = 0.05  # of the parameters outside embeddings and head that may stay wide unasked


@register_quantization_config(METHOD)
class Quantization(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """What transformers hands to `Quantizer`: the settings, or the stored state of each layer; the linear weights that

    are left in their files; the experts to code.
    """

    def __init__(
        self,
        settings: QuantConfig | None = None,
        stored: dict[str, Stored] | None = None,
        observe: Observe | None = None,
        in_files: dict[str, Weight] | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.settings = settings
        self.stored = stored or {}
        self.observe = observe
        self.in_files = in_files or {}
        self.experts: dict[str, CodedExperts] = {}  # by the parameter's full name: what will stand in its place
        self.refusal: DecalError | None = None


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Puts coded layers in the place of linear ones before the weights come, and encodes each weight as it comes."""

    requires_calibration = False
    quantization_config: Quantization

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        replace(model, self.quantization_config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if param_name in self.quantization_config.experts:
            return True
        name, _, part = param_name.rpartition(".")
        return part in ("weight", "scales") and isinstance(model.get_submodule(name), Coded)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes that an element will take: transformers makes room on a card for this much."""
        found = self.quantization_config.experts.get(param_name)
        if found is None:
            return float(param.element_size())
        return (found.weight.numel() + found.scales.numel()) / found.weights

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

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key if key in self.config.experts else key.rpartition(".")[0]
            try:
                if key in self.config.experts:
                    codes, scales = self._experts(key, weight)
                    place(model, key, self.config.experts[key])
                    if missing_keys is not None:
                        missing_keys.discard(key)  # its two parts are set in its stead
                else:
                    codes, scales = self._linear(key, weight, model.get_submodule(name))
            except DecalError as error:
                self.config.refusal = error  # transformers would wrap it in a report of its own
                raise
            made[f"{name}.weight"] = codes
            made[f"{name}.scales"] = scales.to(codes.device)
        return made

    def _linear(self, key: str, weight: Tensor, layer: CodedLinear) -> tuple[Tensor, Tensor]:
        name = key.rpartition(".")[0]
        stored = self.config.stored.get(name)
        if stored is not None:  # transformers has cast the bytes to a float dtype, which holds 0 to 255 exactly
            codes, scales = weight.flatten().to(torch.uint8), scale_bytes(stored.scales)
            check_bytes(layer, codes, scales, key)
            return codes, scales
        wide = weight.T if layer.transposed else weight
        codes, scales = layer.encode(wide, key)
        if self.config.observe is not None:
            self.config.observe(name, wide, quantized.fill(copy.deepcopy(layer), codes, scales, key))
        return codes, scales

    def _experts(self, key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.config.experts[key]
        codes, scales = layer.encode(weight, key)
        if self.config.observe is not None:
            filled = quantized.fill(copy.deepcopy(layer), codes, scales, key)
            for i in range(filled.count):
                self.config.observe(key, filled.matrix(weight, i), filled.expert(i))
        return codes, scales

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


def replace(model: Any, config: Quantization) -> None:
    """Put coded layers without values where linear ones are, and plan for experts, which take their place with values.

    Raises Unsupported where too much would stay wide.
    """
    output, settings = model.get_output_embeddings(), config.settings
    ends = {id(m) for m in (output, model.get_input_embeddings()) if m is not None}
    of_head = None if settings is None else settings.of_head()
    if of_head is not None:
        check_head(model, of_head)
    kept: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() > 1}
        end = id(module) in ends or name.rpartition(".")[2] in HEADS[TaskType.SEQ_CLS]
        how = (of_head if module is output else None) if end else settings
        weight, stored = config.in_files.get(name), config.stored.get(name)
        if not own or isinstance(module, nn.Embedding) or (end and how is None and weight is None and stored is None):
            continue
        linear = how is not None and type(module) in quantized.LINEAR
        to_code = stored is not None or (linear and not _skipped(name, settings))
        if weight is not None:
            form = partial(quantized.room_for, module, None, how) if to_code else None
            place(model, name, streamed.layer_of(weight, module, form))
            continue
        if to_code:
            layer = quantized.room_for(module, stored, how)
            layer.in_slabs = module is output
            # transformers 5.17 casts what it reads to this dtype before it is encoded.
            layer.weight = nn.Parameter(layer.weight.to(module.weight.dtype), requires_grad=False)
            place(model, name, layer)
            continue
        for part, transposed in ({} if settings is None else experts.parameters(module)).items():
            if not _skipped(f"{name}.{part}", settings):
                config.experts[f"{name}.{part}"] = quantized.room_for_experts(own.pop(part), transposed, settings)
                experts.use_eager(module)
        if own:
            kept[name] = sum(p.numel() for p in own.values())
    _check_stored(model, config.stored)
    layers = [m for m in model.modules() if isinstance(m, Coded)]
    coded = sum(layer.weights for layer in (*layers, *config.experts.values()))
    if coded == 0:
        raise Unsupported("the model has no linear layer to quantise", fix="Load it without quantize.")
    share = sum(kept.values()) / (coded + sum(kept.values()))
    if settings is not None and not settings.allow_dense and share > DENSE_SHARE:
        names = sorted(kept, key=lambda n: -kept[n])[:3]
        raise Unsupported(
            f"{100 * share:.0f}% of the parameters beside the embeddings would stay wide: {', '.join(names)}",
            fix="They are in quantize.skip, or no matrices of linear layers or single experts to the model's code. "
            "quantize.allow_dense=true goes on.",
        )


def check_head(model: Any, settings: QuantConfig) -> None:
    """Raise Unsupported unless the model's output head is a linear layer of its own, which quantize.skip leaves be."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    table = model.get_input_embeddings()
    asked = f"quantize.head={settings.format}"
    if type(head) is not nn.Linear:
        raise Unsupported("the model has no linear output head to quantise", got=asked, fix=WIDE_HEAD)
    if model.config.get_text_config().tie_word_embeddings or head.weight is table.weight:
        raise Unsupported(
            "the model's output head is its embedding table, which stays wide: a coded copy would take more memory",
            got=asked,
            fix=WIDE_HEAD,
        )
    if _skipped(name, settings):
        raise Unsupported(f"quantize.skip names the output head {name!r}", got=asked, fix="Choose one of the two.")


def _skipped(name: str, settings: QuantConfig | None) -> bool:
    return settings is not None and any(part in name.split(".") or name == part for part in settings.skip)


def _check_stored(model: nn.Module, stored: Collection[str]) -> None:
    """Raise Unsupported for codes of single experts: transformers holds all of a layer in one tensor."""
    found = {name for name, m in model.named_modules() if isinstance(m, Coded)}
    lost = [name for name in stored if ".experts." in name and name not in found]
    if lost:
        raise Unsupported(
            "the checkpoint holds the 4-bit codes of single experts, which decal does not join",
            got=f"{lost[0]} and {len(lost) - 1} more",
            fix="Load the 16-bit checkpoint with quantize=nf4: its experts are coded as they come.",
        )


def planned_experts(model: nn.Module, settings: QuantConfig) -> tuple[str, ...]:
    """Return the names of the experts that loading would code. `model`, on the meta device, is used up."""
    config = Quantization(settings)
    replace(model, config)
    return tuple(config.experts)


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
            asked = Quantization(settings, observe=observe, in_files=in_files)
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
