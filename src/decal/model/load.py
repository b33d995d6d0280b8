"""Load a base model and its tokenizer, from a folder or the hub, in a dtype that the device is quick in."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from decal import locate
from decal.errors import DecalError
from decal.layers.dense import SIXTEEN_BIT, WideConv1D, WideEmbedding, WideLinear
from decal.model.inject import place
from decal.spec import TaskType

CLASSES = {TaskType.CAUSAL_LM: AutoModelForCausalLM, TaskType.SEQ_CLS: AutoModelForSequenceClassification}
WIDE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: WideLinear,
    nn.Embedding: WideEmbedding,
    Conv1D: WideConv1D,
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
) -> nn.Module:
    """Return the transformers model `name`, a folder or a hub id, in evaluation mode.

    dtype None keeps the checkpoint's storage; on a CPU a 16-bit checkpoint then computes in fp32 (16-bit products are
    up to 22 times slower on a CPU without instructions for them), while its large weights stay 16-bit in memory.
    `low_cpu_mem_usage` is accepted and is always so. Raises DecalError if there is no such model.
    """
    if task not in CLASSES:
        raise DecalError(f"decal does not load models for {task}", fix="Use TaskType.CAUSAL_LM or SEQ_CLS.")
    path = locate.folder(name, kind="model", revision=revision)
    _refuse_non_model(path)
    wanted = dtype if dtype is not None else torch_dtype
    extra: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if device_map is not None:
        extra["device_map"] = device_map
    model: Any = CLASSES[task].from_pretrained(
        path, dtype="auto" if wanted is None else named_dtype(wanted), local_files_only=True, **extra
    )
    model.name_or_path = str(name)  # what adapters record as their base: as the user named it
    if device_map is None:
        model.to(device or default_device())
    if wanted is None and next(model.parameters()).device.type == "cpu":
        compute_in_fp32(model)
    loaded: nn.Module = model.eval()
    return loaded


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Return the tokenizer of the model (or adapter) `name`, a folder or a hub id."""
    path = locate.folder(name, kind="model", revision=revision)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DecalError(
            f"no tokenizer could be loaded ({reason})",
            got=path,
            fix="The folder needs tokenizer.json and its settings.",
        ) from None


def meta_model(name: str | os.PathLike[str], *, revision: str | None = None) -> nn.Module:
    """Return the causal model of a configuration without any weights, on the meta device; only it is downloaded."""
    path = locate.folder(name, kind="model", revision=revision, patterns=["config.json", "generation_config.json"])
    _refuse_non_model(path)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, local_files_only=True))
    model.tie_weights()  # type: ignore[operator]  # transformers' method
    return model


def default_device() -> torch.device:
    """The first CUDA card, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a torch dtype for its short name ("bf16", "fp32", ...); other values are passed on."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return names.get(dtype, dtype) if isinstance(dtype, str) else dtype


def compute_in_fp32(model: nn.Module) -> None:
    """Make a model with 16-bit weights compute in fp32: large weights are widened as they are used, small ones now."""
    for name, module in list(model.named_modules()):
        wide = WIDE.get(type(module))
        if wide is not None and module.weight.dtype in SIXTEEN_BIT:
            place(model, name, _adopted(wide, module))
    for parameter in model.parameters():
        if parameter.dtype in SIXTEEN_BIT and parameter.dim() < 2:
            parameter.data = parameter.data.float()


def _adopted(wide: type[nn.Module], module: nn.Module) -> nn.Module:
    """Return a `wide` that has everything of `module`: its parameters themselves, settings and hooks."""
    new = wide.__new__(wide)
    new.__dict__.update(module.__dict__)
    return new


def _refuse_non_model(path: Any) -> None:
    if not (path / "config.json").is_file():
        found = sorted(entry.name for entry in path.iterdir())[:8]
        hint = (
            "This is an adapter: give its base model, and the adapter with --adapter."
            if (path / "adapter_config.json").is_file()
            else "A model folder has config.json, *.safetensors and tokenizer.json."
        )
        raise DecalError("the folder holds no model (no config.json)", got=f"{path} with {found}", fix=hint)
