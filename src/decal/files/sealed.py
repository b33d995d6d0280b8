"""`decal.json` beside an adapter's PEFT files: what the adapter was trained on, which PEFT's files cannot say."""

from __future__ import annotations

import json
from pathlib import Path

from decal import rundir
from decal.errors import AdapterError
from decal.spec import QuantConfig

SEAL = "decal.json"
VERSION = 1


def write(folder: Path, *, quantize: QuantConfig | None) -> None:
    """Write the seal: {"version": 1, "quantize": the base's storage format in training, null for as it is}."""
    settings = None if quantize is None else quantize.model_dump(mode="json")
    rundir.write_json(folder / SEAL, {"version": VERSION, "quantize": settings})


def read_quantize(folder: Path) -> QuantConfig | None:
    """Return the storage format that the adapter's base had in training; None without a seal, or for as it is."""
    file = folder / SEAL
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["quantize"]
    except (ValueError, KeyError, TypeError):
        raise AdapterError("the adapter's seal is damaged", got=file, fix="Copy the adapter again.") from None
    return None if settings is None else QuantConfig.model_validate(settings)
