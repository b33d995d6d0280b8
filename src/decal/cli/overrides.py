"""From the command line's words to a RunConfig: flags, `key=value` words, and names that people mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decal import rundir
from decal.errors import ConfigError, nearest
from decal.settings import Settings, group_of
from decal.spec import RunConfig, read_run_config

SECTIONS: dict[str, type[Settings]] = {
    name: group for name, field in RunConfig.model_fields.items() if (group := group_of(field.annotation)) is not None
}
OTHER_WORDS = {  # what people write, by habit from other tools, and what decal calls it
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "targets": "lora.target_modules",
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "max_seq_length": "data.max_length",
    "output_dir": "output",
}


def read(words: Sequence[str], values: Mapping[str, Any], *, resume: bool) -> RunConfig:
    """Return the settings that `RUN.yaml [key=value ...]` and flags (by dotted name) mean; flags lie over the file."""
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if len(files) > 1:
        raise ConfigError(
            "more than one settings file", got=" ".join(files), fix="Give one; write overrides as key=value."
        )
    for override in overrides:
        check_key(override.partition("=")[0])
    given = {key: value for key, value in values.items() if value is not None}
    path = Path(files[0]) if files else None
    if path is not None and path.is_dir() and (path / rundir.RUN).is_file():
        path = path / rundir.RUN  # a run folder stands for its settings
    if path is None and not ("model" in given or "data.path" in given):
        raise ConfigError(
            "nothing to train", fix="Give a settings file, or --model and --data. See: decal train --help"
        )
    if resume and path is not None and (path.parent / rundir.MANIFEST).is_file():
        given.setdefault("output", str(path.parent))  # the run goes on where it lies, even if it was moved
    return read_run_config(path, overrides, values=given)


def check_key(key: str) -> None:
    """Raise ConfigError for a dotted key that is no setting, with the one that was probably meant."""
    known = set(RunConfig.model_fields)  # a whole section, too: quantize=nf4, train={lr: 1e-3}
    for section, settings in SECTIONS.items():
        known |= {f"{section}.{name}" for name in settings.model_fields}
    if key in known or any(key.startswith(f"{free}.") for free in ("lora.rank_pattern", "lora.alpha_pattern")):
        return
    last = key.rpartition(".")[2]
    meant = next((name for name in sorted(known) if name.rpartition(".")[2] == last), OTHER_WORDS.get(last))
    hint = f"; nearest is {meant!r}" if meant else nearest(key, sorted(known))
    section = key.partition(".")[0]
    here = SECTIONS.get(section, RunConfig)
    raise ConfigError(f"unknown setting {key!r}{hint}", fix=f"Known here: {', '.join(sorted(here.model_fields))}.")


def target_names(text: str | None) -> str | list[str] | None:
    """Read --targets: `q_proj,v_proj`, or `all-linear`, `attention`, or a regular expression."""
    if text is None:
        return None
    if text in ("all-linear", "attention") or any(sign in text for sign in "*+?()[]|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
