"""Sealing a model's adapter as it is saved, and holding a read one's seal against the model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from decal.files import checkpoint, compared, peft_files, sealed
from decal.files.compared import State
from decal.files.sealed import UNSEALED, Scale, Seal
from decal.layers.adapted import Adapted
from decal.layers.coded import Coded
from decal.layers.replaced import ReplacedModule
from decal.layers.tokens import TokenRows
from decal.model import rows, targets
from decal.spec import PEFT_FORMAT_VERSION, LoraConfig

if TYPE_CHECKING:
    from decal.model.wrapper import PeftModel

PACKAGES = ("decal", "torch", "transformers", "tokenizers", "safetensors")
# Settings of a config.json that decide nothing that a frozen model computes.
IDLE = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "use_cache",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "initializer",
    "dropout",
    "pdrop",
    "_token_id",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "gradient_checkpointing",
)


def base_of(model: nn.Module) -> Seal:
    """Return what is known of a base: all of it if decal loaded it; of another, its configuration and its folder.

    UNSEALED as it is: a base that is to be compared with nothing.
    """
    known: Seal | None = getattr(model, "seal", None)
    if known == UNSEALED:
        return known
    settings = config_of(model)
    if known is not None:
        return replace(known, base_config=settings)
    name = getattr(model, "name_or_path", None) or None
    # The folder tells the weights only where they were not coded by somebody else on their way in.
    coded = any(isinstance(m, Coded) for m in model.modules()) or getattr(model, "is_quantized", False)
    folder = None if coded or name is None else _folder(name, getattr(model, "config", None))
    print_of = None if folder is None else checkpoint.fingerprint(folder)
    return Seal(base_fingerprint=print_of, base_name=name, base_config=settings)


def _folder(name: str, config: Any) -> Path | None:
    """Return where a model's files lie, without asking the network."""
    if os.path.isdir(name):
        return Path(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    return Path(found).parent if isinstance(found, str) else None


def revision_of(folder: Path) -> str | None:
    """Return the commit of a folder in the hub's cache; None for any other."""
    return folder.name if folder.parent.name == "snapshots" else None


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the settings of a model's configuration that decide what it computes, as plain values."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    kept: dict[str, Any] = _deciding(json.loads(json.dumps(config.to_dict(), default=str)))
    return kept


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _deciding(value) if isinstance(value, dict) else value
        for key, value in sorted(settings.items())
        if not key.startswith("_") and not any(idle in key for idle in IDLE)
    }


def seal_of(model: PeftModel, name: str, config: LoraConfig, *, tensors: str) -> Seal:
    """Return the seal of adapter `name` as it is saved now: `config` in the file, `tensors` its tensors' digest.

    An adapter that is saved as it was read keeps the seal that it came with.
    """
    start = model.peft_config[name].init_lora_weights
    converted = start in ("pissa", "olora")
    fresh = replace(
        base_of(model.get_base_model()),
        tensors=tensors,
        scale=Scale(layers=by_last_name(scales(model, name)), **_settings(config)),
        start=f"{start}, saved as plain LoRA of rank 2r" if converted else str(start).lower(),
        versions=versions(),
    )
    if (lost := lost_rows(model, name)) is not None:
        logging.getLogger("decal").warning(lost)
    read = model.seals.get(name, UNSEALED)
    same = read.tensors == tensors and read.scale == fresh.scale
    return read if same else fresh


def lost_rows(model: PeftModel, name: str) -> str | None:
    """Return a line for people if the vocabulary was resized and adapter `name` does not hold the new rows."""
    base: Any = model.get_base_model()
    known: Seal | None = getattr(base, "seal", None)
    before = None if known is None or known.base_config is None else known.base_config.get("vocab_size")
    now = rows.count(base)
    if not isinstance(before, int) or now is None or now <= before:
        return None
    table = targets.original(base.get_input_embeddings())
    for layer in model._carriers[name].values():
        if isinstance(layer, (ReplacedModule, TokenRows)) and targets.original(layer) is table:
            return None
    return (
        f"the vocabulary was resized from {before:,} to {now:,} rows, and adapter {name!r} does not hold the new ones: "
        "after a reload they are other random numbers. Train them with trainable_token_indices, or save the base"
    )


def scales(model: PeftModel, name: str) -> dict[str, float]:
    """Return what adapter `name` multiplies each layer's change by."""
    carriers = model._carriers[name].items()
    return {layer: m.adapters[name].scale for layer, m in carriers if isinstance(m, Adapted)}


def by_last_name(layers: Mapping[str, float]) -> dict[str, float]:
    """Shorten layers' names to their last parts where all layers of that name have one scale; to 12 digits."""
    layers = {layer: float(f"{scale:.12g}") for layer, scale in layers.items()}  # sqrt(r) rounds in the last two
    by_end: dict[str, set[float]] = {}
    for layer, scale in layers.items():
        by_end.setdefault(layer.rpartition(".")[2], set()).add(scale)
    ends = ((layer, layer.rpartition(".")[2], scale) for layer, scale in layers.items())
    return {end if len(by_end[end]) == 1 else layer: scale for layer, end, scale in ends}


def _settings(config: LoraConfig) -> dict[str, Any]:
    return {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that decide what an adapter computes, and whose format its files have."""
    return {"peft_format": PEFT_FORMAT_VERSION, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_base(seal: Seal, model: nn.Module, *, where: str) -> None:
    """Raise AdapterError if `model` is not the base that a read adapter was trained on.

    One line is logged for what could not be compared, and one for a base stored otherwise.
    """
    log = logging.getLogger("decal")
    if seal == UNSEALED:
        log.warning(
            f"{where} is not sealed (no {sealed.SEAL}): whether its base, scale, tokenizer and chat template are "
            "those that it was trained with could not be verified"
        )
        return
    base = base_of(model)
    parts = [compared.weights(seal, base), compared.config(seal, base)]
    compared.refuse(parts, where=where)
    unknown = [part.name for part in parts if part.state is not State.ok]
    if unknown and base != UNSEALED:
        log.info(f"{where}: could not be verified: {', '.join(unknown)}")
    stored = compared.storage(seal, base)
    if stored.state is State.differs:
        log.warning(f"{where} {stored.says}. {stored.fix}")


def check_tensors(seal: Seal, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise AdapterError if a file's tensors are not the sealed ones, to the bit."""
    if seal.tensors is not None:
        compared.refuse([compared.tensors(seal, peft_files.digest(tensors), file=peft_files.WEIGHTS)], where=where)


def check_scale(seal: Seal, model: PeftModel, name: str, *, where: str) -> None:
    """Raise AdapterError if adapter `name` does not have the scale that it was sealed with."""
    compared.refuse([scale_part(seal, model, name)], where=where)


def scale_part(seal: Seal, model: PeftModel, name: str) -> compared.Part:
    """Compare the scales of adapter `name` with the sealed ones."""
    now = Scale(layers={}, **_settings(model.peft_config[name]))
    return compared.scale(seal, scales(model, name), now)
