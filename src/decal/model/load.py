"""Load a base model and its tokenizer, from a folder or the hub, in a dtype that the device is quick in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from decal import locate
from decal.errors import ConfigError, DecalError, Unsupported, nearest
from decal.files import checkpoint, sealed
from decal.layers.dense import SIXTEEN_BIT, WIDE, widened
from decal.model import devices, quantized, quantizer, sealing, streamed
from decal.model.inject import place
from decal.model.targets import HEADS
from decal.reading import one_line, read_json, reading
from decal.spec import QuantConfig, TaskType

AGAIN = "Download or copy the model again."
MOST_LAYERS = 10_000  # of a model; the deepest known ones have a few hundred
CLASSES = {TaskType.CAUSAL_LM: AutoModelForCausalLM, TaskType.SEQ_CLS: AutoModelForSequenceClassification}
MAPPINGS = {
    TaskType.CAUSAL_LM: MODEL_FOR_CAUSAL_LM_MAPPING,
    TaskType.SEQ_CLS: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    task: TaskType = TaskType.CAUSAL_LM,
    device_map: Any = None,
    low_cpu_mem_usage: bool | None = None,
    torch_dtype: str | torch.dtype | None = None,
    num_labels: int | None = None,
    quantize: str | dict[str, Any] | QuantConfig | None = None,
    double_quant: bool = True,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    observe: quantizer.Observe | None = None,
    stream: bool = False,
) -> nn.Module:
    """Return the transformers model `name`, a folder or a hub id, in evaluation mode.

    dtype None keeps the checkpoint's storage; on a CPU a 16-bit checkpoint then computes in fp32 (16-bit products are
    up to 22 times slower on a CPU without instructions for them), while its large weights stay 16-bit in memory.
    `low_cpu_mem_usage` is accepted and is always so.

    `quantize` ("nf4", "fp4", "int8", a QuantConfig or its settings) stores the linear layers in codes as the checkpoint
    streams in, the output head only with QuantConfig(head=...); transformers' BitsAndBytesConfig is understood as
    `quantization_config`. 4-bit checkpoints of bitsandbytes load as they are, without bitsandbytes. `observe` sees each
    weight and its codes as they are made.
    `stream` leaves the weights of linear layers in their files, from where each is read whenever it is needed: for one
    pass through a model that is larger than memory. Raises DecalError if there is no such model or not all of it,
    Unsupported for what cannot be quantised.
    """
    if task not in CLASSES:
        raise DecalError(f"decal does not load models for {task}", fix="Use TaskType.CAUSAL_LM or SEQ_CLS.")
    path = locate.folder(name, kind="model", revision=revision)
    _refuse_non_model(path)
    target = devices.named(device or default_device(), fix="Use cpu, cuda or cuda:1.")
    wanted = dtype if dtype is not None else torch_dtype
    config = _config(path)
    if num_labels is not None:
        config.num_labels = num_labels
    settings = quant_settings(quantize, double_quant, quantization_config)
    with _loading(path):
        in_files = streamed.weights(path, _empty(CLASSES[task], config)) if stream else None
    extra = quantizer.arguments(path, config, settings, observe, in_files)
    if extra and device_map is None and target.type != "cpu":
        device_map = {"": target}  # each tensor is encoded on the card
    if device_map is not None:
        extra["device_map"] = device_map
    if attn_implementation is not None:
        extra["attn_implementation"] = attn_implementation
    with _loading(path):
        model = _read(path, config, task, "auto" if wanted is None else named_dtype(wanted), extra)
    model.seal = sealed.Seal(  # goes into adapters
        base_config=sealing.config_of(model),
        quantize=settings,
        base_fingerprint=checkpoint.fingerprint(path),
        base_name=str(name),
        base_revision=sealing.revision_of(path) or revision,
    )
    model.name_or_path = str(name)  # what adapters record as their base: as the user named it
    if device_map is None:
        model.to(target)
    if wanted is None and next(model.parameters()).device.type == "cpu":
        compute_in_fp32(model)
    loaded: nn.Module = model.eval()
    return loaded


def _config(path: Path) -> Any:
    """Return a model's configuration. Raises DecalError that names the damaged one of its JSON files."""
    checkpoint.Checkpoint(path)  # looks at the index
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            with reading(f"{name} is damaged", path / name, fix=AGAIN):
                found = read_json(path / name)
                if not isinstance(found, dict):
                    raise ValueError("it holds no object")
            if name == "config.json":
                _check_known(found.get("model_type"), path / name)
    with reading("config.json describes no model that transformers knows", path / "config.json", fix=AGAIN):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:  # which would be built one by one, for hours
            raise ValueError(f"{layers} layers")
        return config


def _check_known(kind: object, file: Path) -> None:
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise DecalError(
            f"transformers {transformers.__version__} knows no model of type {one_line(kind, 40)!r}"
            f"{nearest(kind, CONFIG_MAPPING)}",
            got=file,
            fix="Update transformers, or check model_type in this file.",
        )


def _loading(path: Path) -> AbstractContextManager[None]:
    return reading("the model cannot be loaded", path, fix=f"Check that config.json is this model's. {AGAIN}")


def _read(path: Path, config: Any, task: TaskType, dtype: str | torch.dtype, extra: dict[str, Any]) -> Any:
    """Return transformers' model with every weight from the checkpoint, as a plain model."""
    coded = "state_dict" in extra  # transformers takes a folder or tensors, and tensors only with the model's own class
    loader: Any = MAPPINGS[task][type(config)] if coded else CLASSES[task]
    try:
        model, read = loader.from_pretrained(
            None if coded else path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except RuntimeError:
        if "quantization_config" in extra and extra["quantization_config"].refusal is not None:
            raise extra["quantization_config"].refusal from None
        raise
    except SafetensorError as error:
        raise DecalError(
            f"the checkpoint is damaged ({error})",
            got=checkpoint.damaged(path) or path,
            fix="Download or copy this file again.",
        ) from None
    heads = HEADS.get(task, ())  # a new task's head starts at random; nothing else may
    lost = sorted(key for key in read["missing_keys"] if not set(key.split(".")) & set(heads))
    if lost:
        raise DecalError(
            f"the checkpoint lacks {len(lost)} of the model's weights, which would be random numbers",
            got=f"{path} without {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}",
            fix="Download it again, or check that config.json is this checkpoint's.",
        )
    _forget_quantizer(model)
    if "quantization_config" in extra:
        model.save_pretrained = partial(quantized.save_pretrained, model)
    if "quantization_config" in extra:
        _let_go(model)
    if coded and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _let_go(model: nn.Module) -> None:
    """Copy what still lies in the checkpoint's mapped files: one embedding there keeps all their pages resident."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def quant_settings(
    quantize: str | dict[str, Any] | QuantConfig | None, double_quant: bool = True, quantization_config: Any = None
) -> QuantConfig | None:
    """Return one meaning for the ways to ask for quantisation. Raises Unsupported for other configurations."""
    if quantization_config is not None:
        if quantize is not None:
            raise ConfigError("quantize and quantization_config are both given", got=quantize, fix="Give one.")
        if not getattr(quantization_config, "load_in_4bit", False):
            raise Unsupported(
                "only 4-bit configurations of BitsAndBytesConfig are understood",
                got=type(quantization_config).__name__,
                fix='Use load_in_4bit=True, or quantize="nf4", "fp4" or "int8".',
            )
        return QuantConfig(
            format=quantization_config.bnb_4bit_quant_type,
            double_quant=quantization_config.bnb_4bit_use_double_quant,
            skip=tuple(quantization_config.llm_int8_skip_modules or ()),
        )
    if isinstance(quantize, str):
        quantize = {"format": quantize, "double_quant": double_quant}
    if isinstance(quantize, dict):
        return QuantConfig(**quantize)
    if not isinstance(quantize, (QuantConfig, type(None))):
        raise ConfigError("quantize is a format or settings", got=repr(quantize), fix='Use "nf4", "fp4" or "int8".')
    return quantize


def _forget_quantizer(model: Any) -> None:
    """Leave a plain model: what is coded are layers like others, and decal writes them itself."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Return the tokenizer of the model (or adapter) `name`, a folder or a hub id."""
    path = locate.folder(name, kind="model", revision=revision)
    settings = path / "tokenizer_config.json"
    if settings.is_file():
        with reading(f"{settings.name} is damaged", settings, fix=AGAIN):
            read_json(settings)
    with reading("no tokenizer could be loaded", path, fix="The folder needs tokenizer.json and its settings."):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}")
        return tokenizer


def meta_model(name: str | os.PathLike[str], *, revision: str | None = None) -> nn.Module:
    """Return the causal model of a configuration without any weights, on the meta device; only it is downloaded."""
    path = locate.folder(name, kind="model", revision=revision, patterns=["config.json", "generation_config.json"])
    _refuse_non_model(path)
    config = _config(path)
    with _loading(path):
        return _empty(AutoModelForCausalLM, config)


def _empty(auto: Any, config: Any) -> nn.Module:
    """Return a configuration's model without values, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    model.tie_weights()  # type: ignore[operator]  # transformers' method
    return model


def default_device() -> torch.device:
    """The first CUDA card, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a torch dtype for its name ("bf16", "float32", ...); "auto" and dtypes are passed on."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    found = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
        dtype, getattr(torch, dtype, None)
    )
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError("unknown dtype", got=dtype, fix='Use "fp32", "bf16", "fp16" or "auto".')
    return found


def compute_in_fp32(model: nn.Module) -> None:
    """Make a model with 16-bit weights compute in fp32: large weights are widened as they are used, small ones now.

    So are now the weights that a model's own code multiplies with: routers, and experts that are not coded.
    """
    for name, module in list(model.named_modules()):
        wide = widened(module)
        if wide is not None:
            place(model, name, wide)
    for module in model.modules():
        lasting = isinstance(module, (*WIDE.values(), nn.Embedding))
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in SIXTEEN_BIT and not (lasting and parameter.dim() > 1):
                parameter.data = parameter.data.float()


def _refuse_non_model(path: Any) -> None:
    if not (path / "config.json").is_file():
        found = sorted(entry.name for entry in path.iterdir())[:8]
        hint = (
            "This is an adapter: give its base model, and the adapter with --adapter."
            if (path / "adapter_config.json").is_file()
            else "A model folder has config.json, *.safetensors and tokenizer.json."
        )
        raise DecalError("the folder holds no model (no config.json)", got=f"{path} with {found}", fix=hint)
