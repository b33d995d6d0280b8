"""decal: LoRA and QLoRA from plan to production. It measures, grades or refuses; it never fails silently."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decal.api import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from decal.api import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from decal.api import get_peft_model as get_peft_model
    from decal.api import train as train
    from decal.errors import DecalError as DecalError
    from decal.model.load import load_model as load_model
    from decal.model.load import load_tokenizer as load_tokenizer
    from decal.model.quantized import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from decal.model.wrapper import PeftModel as PeftModel
    from decal.recipes.verify import verify as verify
    from decal.spec import DataConfig as DataConfig
    from decal.spec import LoraConfig as LoraConfig
    from decal.spec import PeftConfig as PeftConfig
    from decal.spec import QuantConfig as QuantConfig
    from decal.spec import RunConfig as RunConfig
    from decal.spec import TaskType as TaskType
    from decal.spec import TrainConfig as TrainConfig

__version__ = "0.1.0"

# Imported on first use: `import decal` alone costs no torch.
_EXPORTS = {
    "AutoPeftModelForCausalLM": "decal.api",
    "AutoPeftModelForSequenceClassification": "decal.api",
    "DataConfig": "decal.spec",
    "DecalError": "decal.errors",
    "LoraConfig": "decal.spec",
    "PeftConfig": "decal.spec",
    "PeftModel": "decal.model.wrapper",
    "QuantConfig": "decal.spec",
    "RunConfig": "decal.spec",
    "TaskType": "decal.spec",
    "TrainConfig": "decal.spec",
    "get_peft_model": "decal.api",
    "load_model": "decal.model.load",
    "load_tokenizer": "decal.model.load",
    "prepare_model_for_kbit_training": "decal.model.quantized",
    "train": "decal.api",
    "verify": "decal.recipes.verify",
}
__all__ = sorted(_EXPORTS)  # one table serves both


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"decal has no {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
