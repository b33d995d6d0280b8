"""The names people know from PEFT, and decal's own `train`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from decal import locate, spec
from decal.errors import AdapterError, ConfigError, Unsupported
from decal.files import sealed
from decal.model import load, saved
from decal.model.wrapper import PeftModel
from decal.recipes import finetune
from decal.spec import PeftConfig, RunConfig, TaskType


def get_peft_model(
    model: nn.Module,
    peft_config: spec.LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    *,
    generator: Generator | None = None,
) -> PeftModel:
    """Freeze `model` and put a new adapter on it; layers that bitsandbytes holds in 4 bits become decal's, same bytes.

    What had to be chosen or left out is logged. Raises TargetError for targets that match nothing.
    """
    how = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    wrapped = PeftModel(model, peft_config, adapter_name, **how, generator=generator)
    for note in wrapped.notes:
        logging.getLogger("decal").warning(note)
    return wrapped


class AutoPeftModelForCausalLM:
    """Loads an adapter together with the base that its configuration names."""

    task = TaskType.CAUSAL_LM

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        low_cpu_mem_usage: bool | None = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> PeftModel:
        """Return the base with the adapter on it. Raises AdapterError if the adapter does not say its base."""
        if trust_remote_code:
            raise Unsupported(
                "decal runs no code from a model's repository",
                fix="Load the base with transformers, then PeftModel.from_pretrained(base, adapter).",
            )
        name = pretrained_model_name_or_path
        config = PeftConfig.from_pretrained(name, revision=revision, subfolder=subfolder)
        if not config.base_model_name_or_path:
            raise AdapterError(
                "the adapter does not name its base model",
                got=name,
                fix="Load the base yourself, then PeftModel.from_pretrained(base, adapter).",
            )
        patterns = saved.patterns(subfolder)
        folder = locate.folder(name, kind="adapter", revision=revision, patterns=patterns, subfolder=subfolder)
        seal = sealed.read(folder)
        base = load.load_model(
            config.base_model_name_or_path,
            quantize=seal.quantize if quantization_config is None else None,  # as it was trained
            revision=seal.base_revision or config.revision,
            dtype=dtype,
            torch_dtype=torch_dtype,
            device_map=device_map,
            low_cpu_mem_usage=low_cpu_mem_usage,
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
            task=cls.task,
        )
        return PeftModel.from_pretrained(base, name, adapter_name, is_trainable, revision=revision, subfolder=subfolder)


class AutoPeftModelForSequenceClassification(AutoPeftModelForCausalLM):
    """The same for classification models; the head comes from the adapter."""

    task = TaskType.SEQ_CLS


def train(
    config: RunConfig | str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> finetune.Finetuned:
    """Fine-tune as `decal train` does: from settings (a RunConfig or a YAML file), or from a model and data.

    `overrides` are dotted, "train.lr=1e-4". Returns the run's folder and what it measured.
    """
    if not isinstance(config, (RunConfig, str, os.PathLike, type(None))):
        raise ConfigError(
            "the settings must be a RunConfig or a file", got=type(config).__name__, fix="Use RunConfig(**settings)."
        )
    if not isinstance(config, RunConfig):
        given = {"model": model, "data.path": data, "output": output}
        values = {key: value for key, value in given.items() if value is not None}
        config = spec.read_run_config(None if config is None else Path(config), overrides, values=values)
    return finetune.finetune(config, resume=resume, on_event=on_event)
