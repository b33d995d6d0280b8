"""Typed, frozen, validated settings. Importing this file costs no torch.

`LoraConfig` speaks PEFT's words with PEFT's defaults, exactly; decal's own defaults for training live in
`RunConfig`, which is what `decal train run.yaml` reads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from decal import locate
from decal.errors import AdapterError, ConfigError, DecalError, Unsupported, nearest

ADAPTER_CONFIG = "adapter_config.json"
PEFT_FORMAT_VERSION = "0.21.2"  # the PEFT whose file format and defaults these settings follow


class TaskType(str, Enum):
    """What the adapted model is for, as PEFT names it. decal trains CAUSAL_LM and SEQ_CLS."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    __str__ = str.__str__


class Settings(BaseModel):
    """A frozen group of settings; a wrong one is a ConfigError that names the key and the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self)) from None


def config_error(error: ValidationError, model: type[BaseModel]) -> DecalError:
    """Return the first fault of a pydantic error as what, got and fix."""
    fault = error.errors()[0]
    inner = fault.get("ctx", {}).get("error")
    here = ".".join(str(part) for part in fault["loc"])
    if isinstance(inner, ConfigError):  # the fault lies in a group inside this one: say where
        return ConfigError(f"in {here}: {inner.what}" if here else inner.what, got=inner.got, fix=inner.fix)
    if isinstance(inner, DecalError):
        return inner
    if fault["type"] == "extra_forbidden":
        known = sorted(model.model_fields)
        return ConfigError(f"unknown setting {here!r}{nearest(here, known)}", fix=f"Known here: {', '.join(known)}.")
    if fault["type"] == "missing":
        return ConfigError(f"the setting {here!r} is missing", fix=f"Give {here}.")
    message = fault["msg"].removeprefix("Value error, ")
    return ConfigError(f"the setting {here!r} is wrong: {message}", got=repr(fault["input"]), fix=f"Correct {here}.")


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
    """What every adapter's `adapter_config.json` holds, whatever its kind."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

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

    r: int = Field(default=8, ge=1)
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_whole)] = 8
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = True
    modules_to_save: Annotated[list[str] | None, BeforeValidator(_names)] = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: Annotated[list[str] | None, BeforeValidator(_names)] = None
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False

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
                    raise ValueError(f"{name} is not a regular expression: {error}") from None
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names, not a pattern")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")
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
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{ADAPTER_CONFIG} is not JSON: {error}", got=file, fix="Save the adapter again.") from None
    if not isinstance(values, dict):
        raise AdapterError(
            f"{ADAPTER_CONFIG} must hold an object", got=type(values).__name__, fix="Save the adapter again."
        )
    return LoraConfig(**values)


# --- a training run: decal's words and defaults ---------------------------------------------------------------


class DataConfig(Settings):
    """Where the examples come from, how a row becomes tokens and which tokens are learnt."""

    path: str
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    eval_rows: int = Field(default=0, ge=0)  # held out of the training rows when no eval_path or eval_split is given
    shape: Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text", "template"] = "auto"
    template: str | None = None  # "{{text}} -> {{label}}": what stands before the last column is the prompt
    chat_template: str | None = None  # a Jinja file that replaces the tokenizer's own
    loss_on: Literal["assistant", "all"] = "assistant"
    max_length: int = Field(default=1024, ge=8)
    too_long: Literal["drop", "cut"] = "drop"
    packing: bool = True
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)  # use the first n rows only


class TrainConfig(Settings):
    """How the loop runs. The defaults are decal's own recommendations."""

    method: Literal["lora", "full"] = "lora"
    loss: Literal["sft"] = "sft"
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    lr: float = Field(default=2e-4, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    steps: int | None = Field(default=None, ge=1)  # overrides epochs
    micro_batch: int = Field(default=4, ge=1)  # rows (packed: sequences of max_length) in one forward
    accumulate: int = Field(default=1, ge=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0)  # below 1 a share of all steps, else a number of steps
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    device: str = "auto"
    seed: int = 0
    eval_every: int | None = Field(default=None, ge=1)  # steps; None: after each epoch
    save_every: int | None = Field(default=None, ge=1)  # steps; None: after each epoch
    keep: int = Field(default=2, ge=1)  # checkpoints kept beside the best one
    early_stopping: int | None = Field(default=None, ge=1)  # evaluations without a better loss
    log_to: list[Literal["tensorboard", "wandb", "mlflow"]] = []


def _training_lora(value: Any) -> Any:
    """decal's defaults for training: all linears, r=16, alpha=2r."""
    if isinstance(value, Mapping):
        rank = value.get("r", 16)
        value = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **value}
        if "lora_alpha" not in value and isinstance(rank, int):
            value["lora_alpha"] = 2 * rank
    return value


class QuantConfig(Settings):
    """How a frozen base is stored: 4-bit NF4 or FP4 in blocks, or 8-bit integers by row; its adapters stay fp32."""

    format: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True  # nf4, fp4: 8-bit scales; 4.127 bits per weight instead of 4.5
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    skip: tuple[str, ...] = ()  # modules that stay wide, by name or last name, beside embeddings and head
    allow_dense: bool = False  # go on where over 5% of the other parameters cannot be quantised


def _quantize(value: Any) -> Any:
    return {"format": value} if isinstance(value, str) else value


class RunConfig(Settings):
    """Everything that defines a run; `run.yaml` in the run folder is exactly this."""

    model: str
    data: DataConfig
    lora: Annotated[LoraConfig, BeforeValidator(_training_lora)] = Field(
        default_factory=lambda: LoraConfig(**_training_lora({}))
    )
    train: TrainConfig = TrainConfig()
    quantize: Annotated[QuantConfig | None, BeforeValidator(_quantize)] = None
    output: str = "runs/decal"
    revision: str | None = None

    SECTIONS: ClassVar[tuple[str, ...]] = ("data", "lora", "train", "quantize")

    @model_validator(mode="after")
    def _only_adapters_stand_on_codes(self) -> RunConfig:
        if self.quantize is not None and self.train.method == "full":
            raise ValueError("full fine-tuning moves the weights, and codes cannot: leave quantize out")
        return self

    def to_yaml(self) -> str:
        """Return the settings as YAML that `read_run_config` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_run_config(
    path: Path | None = None, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the settings of a YAML file with `values` and then dotted overrides (`train.lr=1e-4`) laid over it."""
    merged: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError("no such settings file", got=path, fix="Give a YAML file, or --model and --data.")
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}", fix="Correct the file.") from None
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} must hold settings as `key: value`",
                got=type(loaded).__name__,
                fix="See docs/settings.md.",
            )
        merged = loaded
    for key, value in (values or {}).items():
        _lay(merged, key.split("."), value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError("an override must be key=value", got=override, fix="Write it as train.lr=1e-4.")
        _lay(merged, key.split("."), _scalar(text))
    return RunConfig(**merged)


def _scalar(text: str) -> Any:
    """YAML reads 1e-4 as a string (YAML 1.1 wants 1.0e-4): numbers are tried first."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return yaml.safe_load(text)


def _lay(target: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys)!r} is not a setting", fix=f"{key!r} holds a value, not a group.")
        target = inner
    target[keys[-1]] = value
