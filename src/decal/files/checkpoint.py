"""A model's weights in safetensors files, one tensor at a time: read when asked for, written shard by shard.

A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, whose `weight_map` says which
file holds which tensor (the layout of transformers and the hub).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal import rundir
from decal.errors import DecalError
from decal.reading import because, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 2 << 30  # bytes of tensors in one file
PLACES, SAMPLE = 16, 256  # of each tensor, and bytes there, that a fingerprint reads


class Checkpoint:
    """The tensors of a folder by name. Nothing stays in memory, and no file stays open between two reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = _file_of(folder)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        with safe_open(self.file_of[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Return some rows of a tensor as they are stored, on the CPU; no others are read."""
        with safe_open(self.file_of[key], framework="pt") as file:
            part: Tensor = file.get_slice(key)[first:last]
            return part

    def tensor(self, key: str) -> Tensor:
        """Return a tensor as it is stored, on the CPU."""
        with safe_open(self.file_of[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor


def _file_of(folder: Path) -> dict[str, Path]:
    try:
        if (folder / INDEX).is_file():
            weights = read_json(folder / INDEX)["weight_map"]
            return {key: _present(folder / name) for key, name in weights.items()}
        if not (folder / WEIGHTS).is_file():
            return {}
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    except DecalError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        place = folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS)
        raise DecalError(f"the checkpoint is damaged ({because(error)})", got=place, fix="Download it again.") from None


def _present(file: Path) -> Path:
    if not file.is_file():
        raise DecalError("a file of the checkpoint is missing", got=file, fix="Download the checkpoint again.")
    return file


def damaged(folder: Path) -> Path | None:
    """Return the first safetensors file of `folder` that cannot be read, if there is one."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError):
            return file
    return None


def fingerprint(folder: Path) -> str | None:
    """Return what tells this checkpoint's weights from others, however they are split into files; None without any.

    SHA-256 over the names, dtypes and shapes of all tensors and 256 bytes at each of 16 places of every one.
    """
    file_of = _file_of(folder)
    headers = {file: _header(file) for file in set(file_of.values())}
    digests: dict[str, bytes] = {}
    for file in headers:
        with open(file, "rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            for key, facts in headers[file].items():
                digest = hashlib.sha256(f"{key} {facts['dtype']} {facts['shape']}".encode())
                first, last = facts["data_offsets"]
                for place in range(PLACES):
                    at = first + max(0, last - first - SAMPLE) * place // (PLACES - 1)
                    handle.seek(start + at)
                    digest.update(handle.read(min(SAMPLE, last - at)))
                digests[key] = digest.digest()
    return hashlib.sha256(b"".join(digests[key] for key in sorted(digests))).hexdigest() if digests else None


class Writer:
    """Adds tensors to the checkpoint in `folder`, and holds them until a file of `shard` bytes is full. A context."""

    def __init__(self, folder: Path, *, shard: int = SHARD) -> None:
        self.folder, self.shard = folder, shard
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._files: list[Path] = []

    def __enter__(self) -> Writer:
        self._files = sorted(set(_file_of(self.folder).values()))
        (self.folder / INDEX).unlink(missing_ok=True)
        if self._files and self._files[-1].stat().st_size < self.shard:  # there is room in the last one
            last = self._files.pop()
            self.add(load_file(last))
            last.unlink()
        return self

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors over, in the order given."""
        for key, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._held and self._bytes + size > self.shard:
                self._flush()
            self._held[key] = tensor.detach().cpu().contiguous()
            self._bytes += size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self._name()

    def _flush(self) -> None:
        if self._held:
            file = self.folder / f"part-{len(self._files)}.safetensors"
            save_file(self._held, file, metadata={"format": "pt"})
            self._files.append(file)
            self._held, self._bytes = {}, 0

    def _name(self) -> None:
        """Give the files their names, which say how many there are, and write the index."""
        if len(self._files) == 1:
            self._files[0].rename(self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        total = 0
        parts = [file.rename(file.with_suffix(".part")) for file in self._files]  # a new name may be another's old one
        for number, part in enumerate(parts, start=1):
            file = part.rename(self.folder / f"model-{number:05}-of-{len(parts):05}.safetensors")
            header = _header(file)
            weight_map |= dict.fromkeys(header, file.name)
            total += max(facts["data_offsets"][1] for facts in header.values())
        rundir.write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(file: Path) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors: dtype, shape and data_offsets by name, in order."""
    with open(file, "rb") as handle:
        header: dict[str, Any] = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return {key: header[key] for key in sorted(header) if key != "__metadata__"}
