"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read and written strictly.

Keys are `base_model.model.<layer>.<part>` without the adapter's name, for example
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` (r, in).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from decal import rundir
from decal.errors import AdapterError
from decal.reading import because, one_line
from decal.spec import ADAPTER_CONFIG, LoraConfig, read_adapter_config

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a trained tensor is stored in
COUNTERS = (torch.int64, torch.bool)  # buffers of modules saved whole, such as a batch norm's count
PATTERNS = (ADAPTER_CONFIG, WEIGHTS)  # what an adapter needs from a hub repository


def write(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
    """Write one adapter and return its tensors' digest. `tensors` are keyed without the prefix.

    Raises AdapterError for NaN and for empty tensors.
    """
    refuse_broken(tensors, where="the adapter to be saved")
    state: dict[str, Tensor] = {}
    memory: set[int] = set()
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.data_ptr() in memory:  # both names of a tied module: the file holds each, as PEFT's does
            value = value.clone()
        memory.add(value.data_ptr())
        state[f"{PREFIX}{key}"] = value
    rundir.write_bytes(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    rundir.write_json(folder / ADAPTER_CONFIG, config.to_dict())
    return digest({key.removeprefix(PREFIX): value for key, value in state.items()})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over all tensors' names, dtypes, shapes and bytes, in the order of their names.

    `tensors` lie on the CPU, in one piece each, and are keyed without the prefix.
    """
    found = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        found.update(f"{key} {name_of(tensor.dtype)} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read one adapter; keys come back without the prefix. Raises AdapterError for anything damaged or pickled."""
    config = read_adapter_config(folder)
    return config, read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder, keyed without the prefix, on the CPU. Raises AdapterError as `read`."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        if pickles:
            raise AdapterError(
                "the adapter is a pickle, which can run code when it is read; decal never opens one",
                got=folder / pickles[0],
                fix=f"If you trust it, load it with PEFT and save it with safe_serialization=True ({WEIGHTS}).",
            )
        raise AdapterError(f"no {WEIGHTS} in the adapter folder", got=folder, fix="Save the adapter again.")
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensors = {key.removeprefix(PREFIX): handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{WEIGHTS} is damaged or cut short ({because(error)})", got=file, fix="Copy or download the file again."
        ) from None
    if odd := of_other_dtype(tensors):
        raise AdapterError(
            f"{odd[0]} in {file} is stored as {name_of(tensors[odd[0]].dtype)}, which cannot hold what was trained",
            got=f"{len(odd)} of {len(tensors)} tensors",
            fix="Save the adapter in fp32, bf16 or fp16; quantise the base instead of the adapter.",
        )
    refuse_broken(tensors, where=str(file))
    return tensors


def of_other_dtype(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that are not stored as an adapter's: cast to integers, to 8-bit floats or to complex."""
    return [
        key
        for key, tensor in tensors.items()
        if tensor.dtype not in (FLOATS if ".lora_" in key else (*FLOATS, *COUNTERS))
    ]


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def refuse_broken(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise AdapterError if a tensor is empty or holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"{key} in {where} is empty", got=tuple(tensor.shape), fix="Gather shards before saving."
            )
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise AdapterError(
                f"{key} in {where} holds {bad} NaN or infinite values of {tensor.numel()}",
                fix="The run diverged: go back to an earlier checkpoint, lower the learning rate.",
            )


def match(expected: Iterable[str], given: Mapping[str, Tensor], *, where: str) -> None:
    """Raise AdapterError unless the file's keys are exactly the ones that the model expects."""
    wanted, have = set(expected), set(given)
    missing, extra = sorted(wanted - have), sorted(have - wanted)
    if not (missing or extra):
        return
    lack = f"{len(missing)} missing, such as {one_line(missing[0], 60)!r}" if missing else ""
    surplus = f"{len(extra)} that the model has no place for, such as {one_line(extra[0], 60)!r}" if extra else ""
    raise AdapterError(
        f"the tensors of {where} do not fit: {lack or surplus}",
        got=surplus if lack and surplus else None,
        fix="Load the adapter on the model that it was trained on. Run: decal inspect ADAPTER.",
    )
