"""Everything an adapter's two files say about it, read without a model; damage is told, and stops nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decal.errors import AdapterError, DecalError
from decal.files.peft_files import PICKLES, PREFIX, WEIGHTS, name_of, of_other_dtype
from decal.ops import lora
from decal.spec import ADAPTER_CONFIG, IGNORED, NEUTRAL, LoraConfig

HUGE = 100.0  # a change of this norm on one layer drowns any usual base weight
PLAIN = LoraConfig()
TOLD = {  # fields that have lines of their own, or change nothing once the adapter is trained
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "target_modules"),
    *("lora_dropout", "init_lora_weights", "revision"),
}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One layer's change: the Frobenius norm of s·B·A (NaN where they do not fit), and those of its factors."""

    layer: str
    rank: int  # of A, as the file has it
    rank_set: int | None  # by r and rank_pattern; None without a configuration
    scale: float
    norm: float
    norm_A: float
    norm_B: float
    misfit: str | None = None  # the shapes of A and B if there is no product of them


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What there is to know about an adapter. `odd` lists what a person should look at."""

    path: Path
    settings: dict[str, Any]  # adapter_config.json as it stands
    config: LoraConfig | None  # None: decal cannot apply it; `odd` says why
    deltas: tuple[Delta, ...]
    others: tuple[str, ...]  # tensors that are no LoRA factors
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    odd: tuple[str, ...]


def read(folder: Path) -> Facts:
    """Read an adapter folder. Raises AdapterError only if it holds no adapter at all."""
    settings = read_settings(folder)
    odd: list[str] = []
    config: LoraConfig | None = None
    try:
        config = LoraConfig(**settings)
    except DecalError as error:
        odd.append(f"decal cannot apply it: {error}")
    tensors, fault = read_weights(folder)
    if fault:
        odd.append(fault)
    deltas = [delta for key in tensors if (delta := delta_of(key, tensors, config)) is not None]
    factors = {key for key in tensors if ".lora_" in key and "magnitude" not in key}
    odd += oddities(settings, config, tensors, deltas)
    file = folder / WEIGHTS
    return Facts(
        path=folder,
        settings=settings,
        config=config,
        deltas=tuple(deltas),
        others=tuple(sorted(set(tensors) - factors)),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=file.stat().st_size if file.is_file() else 0,
        dtypes=tuple(sorted({name_of(tensor.dtype) for tensor in tensors.values()})),
        odd=tuple(odd),
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json as it stands."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        hint = (
            "This is a whole model: decal targets shows its layers."
            if "config.json" in found
            else ("Give an adapter folder in PEFT's format.")
        )
        raise AdapterError(f"the folder holds no adapter (no {ADAPTER_CONFIG})", got=f"{folder} with {found}", fix=hint)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{ADAPTER_CONFIG} is not JSON: {error}", got=file, fix="Save the adapter again.") from None
    if not isinstance(settings, dict):
        raise AdapterError(f"{ADAPTER_CONFIG} must hold an object", got=file, fix="Save the adapter again.")
    return settings


def read_weights(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors without the file's prefix, and what is wrong with the file, if anything."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        said = f"; {pickles[0]} is a pickle, which decal never opens" if pickles else ""
        return {}, f"there is no {WEIGHTS}{said}"
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return {key.removeprefix(PREFIX): handle.get_tensor(key) for key in handle.keys()}, None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return {}, f"{WEIGHTS} is damaged or cut short ({error})"


def delta_of(key: str, tensors: dict[str, Tensor], config: LoraConfig | None) -> Delta | None:
    """Return the change that a lora_A tensor and its partner make; None for any other key."""
    layer, found, end = key.rpartition(".lora_A.")
    partner = f"{layer}.lora_B.{end}"
    if not found:
        layer, found, end = key.rpartition(".lora_embedding_A")
        partner = f"{layer}.lora_embedding_B{end}"
    if not found or partner not in tensors:
        return None
    A, B = tensors[key].double(), tensors[partner].double()
    rank_set, s = settings_of(layer, config)
    # ||BA||² = tr(AᵀBᵀBA) = <BᵀB, AAᵀ>: two r x r matrices, never the dense product.
    fit = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]
    square = float(((B.T @ B) * (A @ A.T)).sum()) if fit else math.nan
    return Delta(
        layer=layer,
        rank=A.shape[0] if A.dim() else 0,
        rank_set=rank_set,
        scale=s,
        norm=abs(s) * math.sqrt(max(square, 0.0)) if math.isfinite(square) else square,
        norm_A=float(A.norm()),
        norm_B=float(B.norm()),
        misfit=None if fit else f"A is {tuple(A.shape)}, B is {tuple(B.shape)}",
    )


def settings_of(layer: str, config: LoraConfig | None) -> tuple[int | None, float]:
    """Return the rank and s that a configuration gives one layer, rank_pattern and alpha_pattern included."""
    if config is None:
        return None, 1.0
    from decal.model.targets import _by_pattern

    rank = _by_pattern(config.rank_pattern, layer, config.r)
    alpha = _by_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return rank, lora.scale(alpha, rank, rank_stabilized=config.use_rslora)


def oddities(
    settings: dict[str, Any], config: LoraConfig | None, tensors: dict[str, Tensor], deltas: list[Delta]
) -> list[str]:
    """Return what a person should look at, one line each."""
    odd = misshapen(tensors, deltas)
    if other := of_other_dtype(tensors):
        dtype = name_of(tensors[other[0]].dtype)
        odd.append(
            f"{len(other)} of {len(tensors)} tensors are stored as {dtype}, such as {other[0]}: decal refuses it"
        )
    broken = [key for key, tensor in tensors.items() if key not in other and not torch.isfinite(tensor).all()]
    if broken:
        odd.append(f"NaN or infinity in {len(broken)} of {len(tensors)} tensors, such as {broken[0]}: the run diverged")
    zero = [delta.layer for delta in deltas if delta.norm_B == 0]
    if zero:
        all_of = "all" if len(zero) == len(deltas) else f"{len(zero)} of {len(deltas)}"
        odd.append(f"B is zero in {all_of} layers, such as {zero[0]}: nothing was learnt there")
    huge = [delta for delta in deltas if math.isfinite(delta.norm) and delta.norm > HUGE]
    if huge:
        worst = max(huge, key=lambda delta: delta.norm)
        odd.append(f"{len(huge)} changes have a norm above {HUGE:g}; the largest is {worst.norm:.3g} on {worst.layer}")
    odd += unpaired(tensors)
    if config is not None:
        odd += settings_oddities(settings, config, deltas)
    return odd


def misshapen(tensors: dict[str, Tensor], deltas: list[Delta]) -> list[str]:
    """Return lines for factors that are empty, do not fit each other, or are not of the configured rank."""
    lines = []
    if empty := [key for key, tensor in tensors.items() if tensor.numel() == 0]:
        lines.append(f"{len(empty)} of {len(tensors)} tensors are empty, such as {empty[0]}: the file is not whole")
    if misfits := [delta for delta in deltas if delta.misfit]:
        first = misfits[0]
        lines.append(
            f"A and B do not fit each other in {_count(misfits, deltas)}, such as {first.layer}: {first.misfit}"
        )
    if others := [delta for delta in deltas if delta.rank_set not in (None, delta.rank)]:
        first = others[0]
        lines.append(
            f"A has another rank than r or rank_pattern says in {_count(others, deltas)}, such as {first.layer}: "
            f"{first.rank}, not {first.rank_set}"
        )
    return lines


def _count(some: list[Delta], deltas: list[Delta]) -> str:
    return f"all {len(deltas)} layers" if len(some) == len(deltas) else f"{len(some)} of {len(deltas)} layers"


def unpaired(tensors: dict[str, Tensor]) -> list[str]:
    """Return lines for factors whose partner is missing."""
    lines = []
    pairs = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        named = [key for key in tensors if f".{one}." in f"{key}."]  # an embedding's end there
        alone = [key for key in named if key.replace(f".{one}", f".{other}") not in tensors]
        if alone:
            lines.append(f"{len(alone)} {one} tensors have no {other}, such as {alone[0]}: the file is not whole")
    return lines


def settings_oddities(settings: dict[str, Any], config: LoraConfig, deltas: list[Delta]) -> list[str]:
    """Return lines for fields that are not PEFT's defaults and for scales that surprise."""
    odd = []
    if config.use_rslora:
        plain = config.lora_alpha / config.r
        s = lora.scale(config.lora_alpha, config.r, rank_stabilized=True)
        odd.append(f"rsLoRA: the scale is alpha / sqrt(r) = {s:g}, not alpha / r = {plain:g}")
    elif deltas and max(abs(delta.scale) for delta in deltas) > 8:
        odd.append(f"the scale alpha / r is large: {max(abs(delta.scale) for delta in deltas):g}")
    if not config.base_model_name_or_path:
        odd.append("it does not name its base model")
    for name, value in settings.items():
        if name in TOLD or name in NEUTRAL or name in IGNORED or name not in LoraConfig.model_fields:
            continue
        if name == "use_rslora" or getattr(config, name) == getattr(PLAIN, name):
            continue
        odd.append(f"{name} = {value!r}")
    return odd
