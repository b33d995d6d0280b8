"""The settings of an adapter and of a run, typed and validated. Importing this file costs no torch.

`LoraConfig` speaks PEFT's words with PEFT's defaults, exactly; decal's own defaults for training live in
`RunConfig`, which is what `decal train run.yaml` reads. docs/settings.md is written from the descriptions here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from decal import locate
from decal.errors import AdapterError, ConfigError, Unsupported
from decal.reading import read_json, reading
from decal.sections import DataConfig as DataConfig  # `as`: people import all settings from here
from decal.sections import QuantConfig as QuantConfig
from decal.sections import TrainConfig as TrainConfig
from decal.settings import SettingError, Settings, layered

ADAPTER_CONFIG = "adapter_config.json"
PEFT_FORMAT_VERSION = "0.21.2"  # the PEFT whose file format and defaults these settings follow


class TaskType(str, Enum):
    """What the adapted model is for, as PEFT names it; `decal.train` trains CAUSAL_LM."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    __str__ = str.__str__


# --- the adapter: PEFT's words -------------------------------------------------------------------------------


def _names(value: Any) -> Any:
    """Sets (older PEFT files hold them as lists in any order) become sorted lists."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _whole(value: float) -> float:
    """PEFT declares alpha an int: 16.0 stays, reads and is written as 16."""
    return int(value) if value.is_integer() else value


Names = Annotated[list[str] | str | None, BeforeValidator(_names)]

# Fields of PEFT's LoraConfig that decal does not act on, with the values under which PEFT does nothing either.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (None, False),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "qalora_group_size": (None, 16),
    "runtime_config": (None, {}, {"ephemeral_gpu_offload": False}),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
IGNORED = {"megatron_core", "peft_version", "auto_mapping", "qalora_group_size"}  # read, and without effect


class PeftConfig(Settings):
    """What every adapter's `adapter_config.json` holds, whatever its kind. Settings may be changed, as in PEFT."""

    model_config = ConfigDict(frozen=False)

    peft_type: Literal["LORA"] = Field(default="LORA", description="The kind of adapter; there is no other.")
    task_type: TaskType | None = Field(default=None, description="What the model is for.")
    base_model_name_or_path: str | None = Field(default=None, description="The base; filled in from the model.")
    revision: str | None = Field(default=None, description="The base's revision on the hub.")
    inference_mode: bool = Field(default=False, description="The adapter does not train.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Change one setting. The whole is checked first: a wrong value or name is a ConfigError and changes nothing.

        A model made before has its own copy: what was put into it stays.
        """
        checked = type(self)(**{**self.__dict__, name: value})
        if name in checked.__dict__:  # PEFT's further fields, at a value under which they do nothing, have no place
            self.__dict__[name] = checked.__dict__[name]
            self.__pydantic_fields_set__.add(name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> LoraConfig:
        """Read `adapter_config.json` from a local folder or a hub repository; an omitted field means PEFT's default."""
        path = locate.folder(
            pretrained_model_name_or_path,
            kind="adapter",
            revision=revision,
            patterns=[f"{subfolder}/{ADAPTER_CONFIG}" if subfolder else ADAPTER_CONFIG],
            subfolder=subfolder,
        )
        return read_adapter_config(path)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` as PEFT writes it."""
        from decal import rundir

        rundir.write_json(Path(save_directory) / ADAPTER_CONFIG, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as PEFT's `adapter_config.json` holds them (without the fields decal has not)."""
        return {**self.model_dump(mode="json"), "peft_version": PEFT_FORMAT_VERSION}


class LoraConfig(PeftConfig):
    """One adapter: its rank, scale, targets and kind. Names and defaults are PEFT's (0.21).

    The change is W' = W + s·B·A with s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`
    (Hu et al. 2021, eq. 3; Kalajdzievski 2023). `use_dora` re-scales each output row (Liu et al. 2024, eq. 5).
    """

    r: int = Field(default=8, ge=1, description="The rank.")
    lora_alpha: Annotated[float, Field(gt=0), AfterValidator(_whole)] = Field(
        default=8, description="The scale is lora_alpha / r."
    )
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Drops inputs of A in training.")
    target_modules: Names = Field(
        default=None,
        description="`all-linear`, `attention`, last parts of layer names, full names, or a regular expression.",
    )
    exclude_modules: Names = Field(default=None, description="What is left out of the targets.")
    layers_to_transform: list[int] | int | None = Field(default=None, description="Only the layers of these numbers.")
    layers_pattern: list[str] | str | None = Field(
        default=None, description="The part of a name before the layer's number."
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Other ranks, by a layer's name or a regular expression."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Other alphas, by a layer's name or a regular expression."
    )
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Which biases are trained.")
    use_rslora: bool = Field(default=False, description="The scale is lora_alpha / sqrt(r).")
    use_dora: bool = Field(default=False, description="DoRA: trains a length for each output feature, too.")
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = Field(
        default=True, description="How it starts; true and `gaussian` change nothing at first, false is random."
    )
    modules_to_save: Annotated[list[str] | None, BeforeValidator(_names)] = Field(
        default=None, description="Modules that are trained whole."
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(
        default=None, description="Rows of the embedding that are trained."
    )
    target_parameters: Annotated[list[str] | None, BeforeValidator(_names)] = Field(
        default=None, description="Bare parameters to adapt; decal refuses any."
    )
    fan_in_fan_out: bool = Field(default=False, description="The base stores its weight transposed (GPT-2).")
    ensure_weight_tying: bool = Field(default=False, description="A tied embedding and head are adapted as one.")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kept: dict[str, Any] = {}
        for name, value in values.items():
            if name in IGNORED:
                continue
            if name in NEUTRAL:
                if not any(value == neutral for neutral in NEUTRAL[name]):
                    raise Unsupported(
                        f"decal has no {name}",
                        got=repr(value),
                        fix=f"Leave {name} out, or use PEFT for this adapter.",
                    )
                continue
            kept[name] = value
        init = kept.get("init_lora_weights")
        if isinstance(init, str) and init not in ("gaussian", "pissa", "olora"):
            if kept.get("inference_mode"):
                kept["init_lora_weights"] = True  # a trained adapter: how it began no longer matters
            else:
                raise Unsupported(
                    "decal has no such init_lora_weights",
                    got=repr(init),
                    fix="Use True, 'gaussian', False, 'pissa' or 'olora'.",
                )
        if kept.get("peft_type", "LORA") != "LORA":
            raise Unsupported("decal reads LoRA adapters", got=kept["peft_type"], fix="Use PEFT for this adapter.")
        if isinstance(kept.get("task_type"), TaskType):
            kept["task_type"] = kept["task_type"].value
        for name in ("rank_pattern", "alpha_pattern"):
            if kept.get(name, {}) is None:
                kept[name] = {}
        return kept

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise SettingError(
                        f"'{{at}}{name}' is not a regular expression: {error}",
                        got=repr(pattern),
                        fix="Correct it, or write names as a list: [q_proj, v_proj].",
                    ) from None
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise SettingError(
                "'{at}layers_to_transform' needs '{at}target_modules' as a list of names",
                got=f"target_modules={self.target_modules!r}",
                fix="Write {at}target_modules=[q_proj, v_proj], or leave {at}layers_to_transform out.",
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise SettingError(
                "'{at}layers_pattern' has no effect without '{at}layers_to_transform'",
                got=f"layers_pattern={self.layers_pattern!r}",
                fix="Give {at}layers_to_transform=[0, 1], or leave {at}layers_pattern out.",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["lora_alpha"] = self.lora_alpha  # whole numbers as such, which a dump makes floats
        values["alpha_pattern"] = {k: int(v) if v.is_integer() else v for k, v in self.alpha_pattern.items()}
        return values


def read_adapter_config(path: Path) -> LoraConfig:
    """Read a folder's `adapter_config.json`; refuse what decal cannot apply faithfully."""
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        found = sorted(entry.name for entry in path.iterdir())[:8]
        raise AdapterError(
            f"no {ADAPTER_CONFIG} in the adapter folder",
            got=f"{path} with {found}",
            fix="Give an adapter folder in PEFT's format.",
        )
    with reading(f"{ADAPTER_CONFIG} is not JSON", file, fix="Save the adapter again.", kind=AdapterError):
        values = read_json(file)
    if not isinstance(values, dict):
        raise AdapterError(
            f"{ADAPTER_CONFIG} must hold an object", got=type(values).__name__, fix="Save the adapter again."
        )
    try:
        return LoraConfig(**values)
    except SettingError as error:
        raise ConfigError(f"{file}: {error.what}", got=error.got, fix=error.fix) from None


# --- a training run: decal's words and defaults ---------------------------------------------------------------


def _training_lora(value: Any) -> Any:
    """decal's defaults for training: all linears, r=16, alpha=2r. A LoraConfig is taken as it is, as a copy."""
    if isinstance(value, LoraConfig):
        return value.model_copy(deep=True)
    if isinstance(value, Mapping):
        rank = value.get("r", 16)
        value = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **value}
        if "lora_alpha" not in value and isinstance(rank, int):
            value["lora_alpha"] = 2 * rank
    return value


def _quantize(value: Any) -> Any:
    return {"format": value} if isinstance(value, str) else value


class RunConfig(Settings):
    """Everything that defines a run; `run.yaml` in the run folder is exactly this."""

    model: str = Field(description="The base: a folder or a hub id.")
    data: DataConfig = Field(description="See below.")
    lora: Annotated[LoraConfig, BeforeValidator(_training_lora)] = Field(
        default_factory=lambda: LoraConfig(**_training_lora({})), description="See below."
    )
    train: TrainConfig = Field(default=TrainConfig(), description="See below.")
    quantize: Annotated[QuantConfig | None, BeforeValidator(_quantize)] = Field(
        default=None, description="Store the frozen base in few bits; a format alone (`nf4`) or the section below."
    )
    output: str = Field(default="runs/decal", description="The run folder.")
    revision: str | None = Field(default=None, description="The base's revision on the hub.")

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.quantize is not None and self.train.method == "full":
            raise ConfigError(
                "full fine-tuning moves the weights, and quantised ones cannot move",
                got=f"train.method=full with quantize={self.quantize.format}",
                fix="Leave quantize out, or train an adapter: train.method=lora.",
            )
        if self.lora.task_type not in (None, TaskType.CAUSAL_LM):
            raise ConfigError(
                "a run trains a causal language model, so its adapter cannot be marked as one for another task",
                got=f"lora.task_type={self.lora.task_type}",
                fix="Leave lora.task_type out; for other tasks use get_peft_model with a loop of your own.",
            )
        return self

    def to_yaml(self) -> str:
        """Return the settings as YAML that `read_run_config` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_run_config(
    path: Path | None = None, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the settings of a YAML file with `values` and then dotted overrides (`train.lr=1e-4`) laid over it."""
    return RunConfig(**layered(RunConfig, path, overrides, values or {}, short={"quantize": "format"}))
