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
from decal.files.peft_files import PICKLES, PREFIX, WEIGHTS
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
    """One layer's change: the Frobenius norm of s·B·A, and the norms of its factors."""

    layer: str
    rank: int
    scale: float
    norm: float
    norm_A: float
    norm_B: float


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
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
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
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        return None
    rank = A.shape[0]
    s = scale_of(layer, rank, config)
    # ||BA||² = tr(AᵀBᵀBA) = <BᵀB, AAᵀ>: two r x r matrices, never the dense product.
    square = float(((B.T @ B) * (A @ A.T)).sum())
    norm = abs(s) * math.sqrt(max(square, 0.0)) if math.isfinite(square) else square
    return Delta(layer=layer, rank=rank, scale=s, norm=norm, norm_A=float(A.norm()), norm_B=float(B.norm()))


def scale_of(layer: str, rank: int, config: LoraConfig | None) -> float:
    """Return s of one layer, alpha_pattern included."""
    if config is None:
        return 1.0
    from decal.model.targets import _by_pattern

    alpha = _by_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return lora.scale(alpha, rank, rank_stabilized=config.use_rslora)


def oddities(
    settings: dict[str, Any], config: LoraConfig | None, tensors: dict[str, Tensor], deltas: list[Delta]
) -> list[str]:
    """Return what a person should look at, one line each."""
    odd = []
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
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


def unpaired(tensors: dict[str, Tensor]) -> list[str]:
    """Return lines for factors whose partner is missing, or does not fit."""
    lines = []
    for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        alone = [key for key in tensors if f".{one}." in key and key.replace(f".{one}.", f".{other}.") not in tensors]
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
    ranks = {delta.rank for delta in deltas}
    if ranks and config.r not in ranks:
        odd.append(f"no layer has the configured rank {config.r}; found {sorted(ranks)}")
    return odd
